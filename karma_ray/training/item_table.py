"""The shared table of a step's unique items: each item is encoded once, by one worker.

The collator makes a table of the unique items in a worker's windows. Workers have items in common
(popular ones, and each other's positives as negatives). The tables are therefore united, encoding
is divided into shares with similar token counts, and the vectors are gathered with gradient. A
batch then has the same form for one worker and for many: indices into one table.

Legend: U items of a worker's table, G items of the united one, P pool, O own share, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from karma_ray.data.batch import Batch, host_of, upload
from karma_ray.objectives.negatives import first_occurrences
from karma_ray.training.parallel import (
    all_gather_ints,
    all_gather_rows,
    global_max,
    global_sum,
    rank,
    world_size,
)


@dataclass(frozen=True)
class SharedBatch:
    """A worker's windows, with indices into the united table of items."""

    batch: Batch  # item_index and hard_index point into the G united items
    pool: Tensor  # [P] united items used as in-batch negatives: positives of distinct content
    shares: tuple[Tensor, ...]  # united items that each worker encodes, in rank order
    num_uses: int  # history items, positives and hard negatives of all workers, with repeats
    num_clicks: int  # clicks of all workers behind the pool, with repeats

    @property
    def own(self) -> Tensor:
        """United items [O] that this worker encodes."""
        return self.shares[rank()]

    @property
    def num_items(self) -> int:
        """Number of united items, G."""
        return len(self.batch.item_rows)

    def gathered(self, own: Tensor) -> Tensor:
        """Vectors of this worker's share [O, D] -> of all united items [G, D], with gradient."""
        if len(self.shares) == 1:
            return own
        everyone = all_gather_rows(own, [len(share) for share in self.shares])
        return everyone[torch.cat(self.shares).argsort()]

    def encoded(self, encode: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Gather `encode(tokens [O, L], lengths [O], rows [O]) -> [O, D]` of all shares."""
        return self.gathered(encode(*self.texts(self.own))[: len(self.own)])

    def texts(self, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens [O, L], lengths [O] and catalogue rows [O] of united items.

        For an empty share this is one item whose vector is dropped, because all workers must run
        the layers equally often.
        """
        items = items if len(items) else items.new_zeros(1)
        chosen = host_of(items)
        lengths = host_of(self.batch.item_lengths)[chosen]
        tokens = self.batch.item_tokens[items, : int(lengths.max())]
        rows = host_of(self.batch.item_rows)[chosen]
        return tokens, upload(lengths, items.device), upload(rows, items.device)


def share_items(batch: Batch) -> SharedBatch:
    """Unite the workers' item tables; this is a collective that every worker calls once a step."""
    host, device = batch.on_host(), batch.item_rows.device
    positives = torch.zeros_like(host.item_rows)
    positives[host.item_index[host.loss_mask]] = 1
    uses, clicks = host.item_mask.sum() + host.hard_mask.sum(), host.loss_mask.sum()
    counts = torch.stack([uses, clicks])
    if world_size() == 1:
        everything = upload(torch.arange(len(host.item_rows)), device)
        pool = upload(_pool(positives, host.item_content), device)
        return SharedBatch(batch, pool, (everything,), *counts.tolist())
    counts, positives = global_sum(counts.to(device)), positives.to(device)
    width = int(global_max(torch.tensor(batch.item_tokens.shape[1], device=device)))
    tokens = functional.pad(batch.item_tokens, (0, width - batch.item_tokens.shape[1]))
    facts = torch.stack([batch.item_rows, batch.item_lengths, batch.item_content, positives], 1)
    table = all_gather_ints(torch.cat([facts, tokens], 1))
    rows, place = torch.unique(table[:, 0], return_inverse=True)
    united = table[first_occurrences(table[:, 0])]
    united = united[united[:, 0].argsort()]
    positives = torch.zeros_like(rows).index_add_(0, place, table[:, 3])
    local = torch.searchsorted(rows, batch.item_rows)
    shared = replace(
        batch,
        item_rows=rows,
        item_lengths=united[:, 1].contiguous(),
        item_content=united[:, 2].contiguous(),
        item_tokens=united[:, 4:].contiguous(),
        item_index=local[batch.item_index],
        hard_index=local[batch.hard_index],
    )
    longest_first = shared.item_lengths.argsort(descending=True, stable=True)
    shares = tuple(longest_first[number :: world_size()] for number in range(world_size()))
    pool = _pool(positives, shared.item_content)
    return SharedBatch(shared, pool, shares, *counts.tolist())


def _pool(positives: Tensor, content: Tensor) -> Tensor:
    """Return one clicked item [P] per content, the one with the smallest catalogue row."""
    clicked = positives.nonzero().squeeze(1)
    return clicked[first_occurrences(content[clicked])]

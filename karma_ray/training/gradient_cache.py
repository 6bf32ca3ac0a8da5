"""The gradient cache: a large batch in the memory of a small one, with the same gradients.

This is GradCache (2101.06983), cut at the vectors of the unique items. They are all that the users
of a batch share: as history, as hard negatives, and as in-batch negatives of all users.

    1. encode the items in chunks and keep only their vectors
    2. run users in micro-batches on those vectors, forward and backward, and sum the gradients
    3. encode each chunk again with the same random numbers, and backpropagate the gradient

Plain gradient accumulation would shrink the pool of in-batch negatives to the micro-batch's.

Legend: U items of the batch, G items of all workers' united table, B windows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from karma_ray.data.batch import Batch, host_of, upload
from karma_ray.training.item_table import SharedBatch
from karma_ray.training.parallel import global_max, global_sum, is_parallel

Encode = Callable[[Tensor, Tensor, Tensor], Tensor]
"""tokens [O, L], lengths [O], catalogue rows [O] -> e [O, D]."""


class CachedItems:
    """Item vectors without a graph, and a backward pass into the encoder."""

    def __init__(self, shared: SharedBatch, encode: Encode, micro_tokens: int) -> None:
        """Encode this worker's share in chunks of about `micro_tokens`, and gather all shares."""
        self._shared, self._encode = shared, encode
        self._chunks = _chunks(shared, micro_tokens)
        self._states: list[list[Tensor]] = []
        parts = []
        with torch.no_grad():
            for chunk in self._chunks:
                self._states.append(_random_states(chunk.device))
                parts.append(self._run(chunk)[: len(chunk)])
            # Weights that autocast has cast without a graph must not be reused with one.
            torch.clear_autocast_cache()
            found = torch.cat(parts)
            own = torch.empty_like(found)
            own[_places(shared, torch.cat(self._chunks))] = found
            self.vectors = shared.gathered(own).detach().requires_grad_()

    def backward(self) -> None:
        """Backpropagate the gradient of the vectors, summed over workers, into the encoder."""
        gradient = self.vectors.grad
        total = global_sum(torch.zeros_like(self.vectors) if gradient is None else gradient)
        for chunk, states in zip(self._chunks, self._states, strict=True):
            with _replayed(states, chunk.device):
                again = self._run(chunk)
            wanted = torch.zeros_like(again)
            wanted[: len(chunk)] = total[chunk].to(again.dtype)
            run_backward(again, wanted)

    def _run(self, chunk: Tensor) -> Tensor:
        return self._encode(*self._shared.texts(chunk))


def micro_batches(batch: Batch, size: int) -> Iterator[tuple[Batch, Tensor]]:
    """Yield windows of similar length, `size` at a time, with the items [U] that each part uses.

    Every worker yields equally many parts; one that has no windows left yields parts without loss.
    """
    device = batch.step_mask.device
    count = _largest(-(-batch.num_windows // size), device)
    batch = batch.on_host()  # planned there, and moved part by part
    by_length = batch.step_mask.sum(1).argsort(stable=True)
    for rows in by_length.tensor_split(count):
        part, used = narrow(batch, rows if len(rows) else by_length[:1])
        if not len(rows):
            nothing = torch.zeros_like(part.loss_mask)
            none = torch.zeros_like(part.decode_mask)
            part = replace(part, loss_mask=nothing, decode_mask=none)
        yield part.to(device), upload(used, device)


def narrow(batch: Batch, rows: Tensor) -> tuple[Batch, Tensor]:
    """Return the batch with only the windows `rows`, and the items [U] that they use.

    On an accelerator this waits; `micro_batches` does it on the host.
    """
    steps = max(1, int(batch.step_mask[rows].sum(1).max()))
    item_index, hard_index = batch.item_index[rows, :steps], batch.hard_index[rows, :steps]
    item_mask, hard_mask = batch.item_mask[rows, :steps], batch.hard_mask[rows, :steps]
    used = torch.cat([item_index[item_mask], hard_index[hard_mask], item_index.new_zeros(1)])
    used = torch.unique(used)
    queries, query_index = torch.unique(batch.query_index[rows, :steps], return_inverse=True)
    lengths = batch.query_lengths[queries]
    part = replace(
        batch,
        item_rows=batch.item_rows[used],
        item_tokens=batch.item_tokens[used],
        item_lengths=batch.item_lengths[used],
        item_content=batch.item_content[used],
        query_tokens=batch.query_tokens[queries, : int(lengths.max())],
        query_lengths=lengths,
        query_index=query_index,
        item_index=torch.searchsorted(used, item_index),
        hard_index=torch.searchsorted(used, hard_index),
        item_mask=item_mask,
        hard_mask=hard_mask,
        step_mask=batch.step_mask[rows, :steps],
        group=batch.group[rows, :steps],
        loss_mask=batch.loss_mask[rows, :steps],
        decode_step=batch.decode_step[rows],
        decode_mask=batch.decode_mask[rows],
        row_key=batch.row_key[rows],
        visual_feature=batch.visual_feature[rows],
        visual_mask=batch.visual_mask[rows],
    )
    return part, used


def run_backward(output: Tensor, gradient: Tensor | None = None) -> None:
    """Run a backward pass in the types of its forward pass, also inside an autocast region."""
    with torch.autocast(output.device.type, enabled=False):
        torch.autograd.backward(output, gradient)


def _chunks(shared: SharedBatch, micro_tokens: int) -> list[Tensor]:
    """Split this worker's items, sorted by length, into equally many chunks on every worker."""
    own, item_lengths = host_of(shared.own), host_of(shared.batch.item_lengths)
    device = shared.own.device
    own = own[item_lengths[own].argsort(stable=True)]
    before = item_lengths[own].cumsum(0)
    total = int(before[-1]) if len(before) else 0
    count = max(1, _largest(-(-total // micro_tokens), device))
    number = (before - 1) * count // max(1, total)
    sizes = torch.bincount(number, minlength=count).tolist()
    return [upload(chunk, device) for chunk in torch.split(own, sizes)]


def _largest(count: int, device: torch.device) -> int:
    """Return the largest count of all workers."""
    return int(global_max(torch.tensor(count, device=device))) if is_parallel() else count


def _places(shared: SharedBatch, items: Tensor) -> Tensor:
    """Return the positions of united items [O] in this worker's share."""
    place = torch.empty(shared.num_items, dtype=torch.long, device=items.device)
    place[shared.own] = torch.arange(len(shared.own), device=items.device)
    return place[items]


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextmanager
def _replayed(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Reuse the random numbers of the first pass, and leave the random stream unchanged."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], device)
        yield

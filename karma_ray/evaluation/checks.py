"""Does the model use what it should, and nothing else?

Two perturbations on a trained model: strangers' histories must lower the metrics; a future or
same-step item must change h by exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from karma_ray.data.batch import Batch
from karma_ray.data.pixels import NO_PICTURE
from karma_ray.model.recall import RecallModel


def with_other_histories(examples: pa.Table, seed: int) -> pa.Table:
    """The same requests, each with the history of another user's example.

    Every column that tells of the past moves together; query and truth stay.
    """
    users = examples.column("user_id").to_numpy(zero_copy_only=False)
    order = np.random.default_rng(seed).permutation(len(users))
    # Along a random order, shift by one, and further while the user is still the same.
    source = np.empty(len(users), np.int64)
    for place, row in enumerate(order):
        step = 1
        while step < len(order) and users[order[(place + step) % len(order)]] == users[row]:
            step += 1
        source[row] = order[(place + step) % len(order)]
    for name in ("history_queries", "history_item_ids", "history_timestamps"):
        index = examples.schema.get_field_index(name)
        examples = examples.set_column(index, name, examples.column(name).take(pa.array(source)))
    return examples


@torch.no_grad()
def hidden_item_effect(model: RecallModel, batch: Batch) -> dict[str, float]:
    """Largest change of any h_k when items it must not see are replaced; both must be 0.

    `future_perturbation_max_abs`: items of later groups than k's; `same_step_...`: items of
    k's own group (its target and the clicks of the same page).
    """
    # Texts will do for a multimodal encoder too: only who sees whose vector is looked at.
    rows = torch.full_like(batch.item_rows, NO_PICTURE)
    items = model.encode_items(batch.item_tokens, batch.item_lengths, rows)
    # A second, different table behind the first; both runs go through the same sizes, because
    # a matrix product's rounding may depend on them. In directions of no pattern: a layer norm
    # would not see a constant.
    other = torch.randn(items.shape, generator=torch.Generator().manual_seed(0)).to(items)
    table = torch.cat([items, 3.0 * items.flip(0) + other])
    before = model.interest(batch, table)
    return {
        "future_perturbation_max_abs": _effect(model, batch, table, before, torch.gt),
        "same_step_perturbation_max_abs": _effect(model, batch, table, before, torch.eq),
    }


def _effect(
    model: RecallModel,
    batch: Batch,
    table: Tensor,  # [2 U, D]
    before: Tensor,  # [B, T, D]
    hidden: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """Replace, for the group of every step in turn, the hidden items; compare h at that step."""
    largest, count = 0.0, len(table) // 2
    for step in range(batch.step_mask.shape[1]):
        change = hidden(batch.group, batch.group[:, step : step + 1]) & batch.item_mask
        other = torch.where(change, batch.item_index + count, batch.item_index)
        after = model.interest(replace(batch, item_index=other), table)
        exists = batch.step_mask[:, step]
        difference = (after[:, step] - before[:, step])[exists].abs()
        largest = max(largest, float(difference.max()) if difference.numel() else 0.0)
    return largest

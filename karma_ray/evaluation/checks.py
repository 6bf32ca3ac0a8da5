"""Checks that a model uses the history, and uses nothing that it must not see.

Two perturbations of a trained model: histories of other users must lower the metrics, and a
future or same-step item must change h by exactly zero.
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
    """Return the same requests, each with the history of an example of another user.

    All history columns are exchanged together; query and target stay.
    """
    users = examples.column("user_id").to_numpy(zero_copy_only=False)
    order = np.random.default_rng(seed).permutation(len(users))
    # Shift by one in a random order, and by more while the user is the same.
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
    """Return the largest change of any h_k when masked items are replaced; it must be 0.

    `future_perturbation_max_abs` replaces items of later groups than k's, and `same_step_...`
    items of k's own group (its target and the other clicks of the page).
    """
    # A multimodal encoder can encode texts alone here: only the attention mask is tested.
    rows = torch.full_like(batch.item_rows, NO_PICTURE)
    items = model.encode_items(batch.item_tokens, batch.item_lengths, rows)
    # A second, different table follows the first, so that both runs have the same sizes; the
    # rounding of a matrix product may depend on them. Its values are random, because a layer norm
    # would remove a constant.
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
    """Replace the masked items for the group of each step in turn, and compare h at that step."""
    largest, count = 0.0, len(table) // 2
    for step in range(batch.step_mask.shape[1]):
        change = hidden(batch.group, batch.group[:, step : step + 1]) & batch.item_mask
        other = torch.where(change, batch.item_index + count, batch.item_index)
        after = model.interest(replace(batch, item_index=other), table)
        exists = batch.step_mask[:, step]
        difference = (after[:, step] - before[:, step])[exists].abs()
        largest = max(largest, float(difference.max()) if difference.numel() else 0.0)
    return largest

"""The tensors of one step; items and queries are indices into tables of unique ones.

Legend: B windows, T steps, U unique items, V unique queries, H hard negatives, L tokens,
M decoded positions per window, N_v tokens of width d_v of an image.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The tensors of one step; see the legend of this module."""

    item_rows: Tensor  # [U] catalogue rows
    item_tokens: Tensor  # [U, L]
    item_lengths: Tensor  # [U]
    item_content: Tensor  # [U] equal for items with equal texts
    query_tokens: Tensor  # [V, Lq]
    query_lengths: Tensor  # [V] 0: no query
    query_index: Tensor  # [B, T] into V
    item_index: Tensor  # [B, T] into U
    item_mask: Tensor  # [B, T] the step has an item as input (not at a request's current step)
    step_mask: Tensor  # [B, T] the step exists and is not padding
    group: Tensor  # [B, T] equal for steps of the same page or time
    loss_mask: Tensor  # [B, T] the step's click enters the losses
    hard_index: Tensor  # [B, T, H] into U
    hard_mask: Tensor  # [B, T, H]
    decode_step: Tensor  # [B, M] steps decoded into text
    decode_mask: Tensor  # [B, M]
    row_key: Tensor  # [B] key of the window's random draws (data/draws.py)
    visual_feature: Tensor  # [B, M, N_v, d_v] of the decoded items; N_v = 0 without a visual term
    visual_mask: Tensor  # [B, M] the item has an image

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on another device."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return Batch(**moved)

    @property
    def num_windows(self) -> int:
        """Number of windows B."""
        return int(self.step_mask.shape[0])

    @property
    def num_tokens(self) -> int:
        """Number of real tokens that enter the two LLMs: item texts, queries and items."""
        return int(self.item_lengths.sum() + 2 * self.step_mask.sum())

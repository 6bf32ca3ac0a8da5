"""The tensors of one step; items and queries are indices into tables of unique ones.

A step on an accelerator is planned on the host: lengths, masks and indices decide what is computed,
and reading them back would make the host wait for all work before. So whatever is copied to a
device with `upload` remembers its original, which `host_of` returns without waiting.

Legend: B windows, T steps, U unique items, V unique queries, H hard negatives, L tokens,
M decoded positions per window, N_v tokens of width d_v of an image.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor of the host to a device without waiting for the device's work."""
    copied = _copied(tensor, torch.device(device))
    if copied is not tensor:
        copied.original = tensor  # type: ignore[attr-defined]
    return copied


def host_of(tensor: Tensor) -> Tensor:
    """Return the values on the host: the original of an upload, or else a copy, which waits."""
    original = getattr(tensor, "original", None)
    return tensor.cpu() if original is None else cast(Tensor, original)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # copies from other memory wait
    return tensor.to(device, non_blocking=True)


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
        return Batch(**{f.name: upload(getattr(self, f.name), device) for f in fields(self)})

    def on_host(self) -> Batch:
        """Return the same batch on the host; one that was moved from there remembers it."""
        return Batch(**{f.name: host_of(getattr(self, f.name)) for f in fields(self)})

    @property
    def num_windows(self) -> int:
        """Number of windows B."""
        return int(self.step_mask.shape[0])

    @property
    def num_tokens(self) -> int:
        """Number of real tokens that enter the two LLMs: item texts, queries and items."""
        return int(host_of(self.item_lengths).sum() + 2 * host_of(self.step_mask).sum())

"""Layout of the user decoder's input: slots of queries and items, attention mask and read-out.

Every step has a block of W query slots and one item slot after the prompt:

    [prompt x n_p] [q_1 x W, i_1] [q_2 x W, i_2] ... [q_T x W, i_T]

The three layouts of method 1.3 differ only in attention mask, positions and read-out. Steps of
the same *group* (a result page, or equal times) are invisible to each other: the mask separates
them, and they share position ids.

Legend: B windows, T steps, W query slots, S = n_p + T (W + 1) slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from karma_ray.data.batch import host_of, upload
from karma_ray.model.config import UserDecoderConfig


@dataclass(frozen=True)
class Layout:
    """Index tensors of one batch."""

    visible: Tensor  # [B, S, S] row attends to column
    positions: Tensor  # [B, S]
    real: Tensor  # [B, S] slots in use; all others are masked and never read
    readout: Tensor  # [B, T] slot whose state is h_k


def build_layout(
    kind: str,
    num_prompt: int,
    query_lengths: Tensor,  # [B, T] used query slots of each step, 1..W
    width: int,
    group: Tensor,  # [B, T]
    item_mask: Tensor,  # [B, T]
    step_mask: Tensor,  # [B, T]
) -> Layout:
    """Build the attention mask, positions and read-out slots of a batch of windows."""
    device = group.device
    num_windows, num_steps = group.shape
    block = width + 1
    slot = torch.arange(num_steps * block, device=device)
    step, offset = slot // block, slot % block  # [S - n_p]
    is_item = (offset == width)[None, :]
    slot_group = group[:, step]
    used = _used(query_lengths, width, item_mask, step_mask)

    causal = slot[:, None] >= slot[None, :]
    same_step = step[:, None] == step[None, :]
    other_group = slot_group[:, :, None] != slot_group[:, None, :]
    sees_items = causal & other_group | torch.eye(len(slot), dtype=torch.bool, device=device)
    if kind == "interleaved":
        sees_queries = causal & (other_group | same_step)
    elif kind == "query_last":
        sees_queries = (causal & same_step & ~is_item.T).expand_as(other_group)
    else:  # items_only: there are no queries, so items of a group may attend causally
        sees_queries = torch.zeros_like(other_group)
        sees_items = causal.expand_as(other_group)
    among = torch.where(is_item[:, None, :], sees_items, sees_queries) & used[:, None, :]

    total = num_prompt + len(slot)
    visible = torch.zeros(num_windows, total, total, dtype=torch.bool, device=device)
    prompt = torch.arange(num_prompt, device=device)
    visible[:, :num_prompt, :num_prompt] = prompt[:, None] >= prompt[None, :]
    visible[:, num_prompt:, :num_prompt] = True
    visible[:, num_prompt:, num_prompt:] = among

    before = (other_group_steps(group, step_mask)).sum(-1)  # [B, T] steps of earlier groups
    positions = _positions(kind, num_prompt, before, step, offset, width)
    readout = num_prompt + torch.arange(num_steps, device=device) * block + query_lengths - 1
    if kind == "items_only":
        last_item = num_prompt + before * block - 1  # slot of the last item of earlier groups
        readout = torch.where(before > 0, last_item, num_prompt - 1)
    planned = _used(host_of(query_lengths), width, host_of(item_mask), host_of(step_mask))
    if kind == "items_only":
        planned = planned & (torch.arange(planned.shape[1]) % block == width)
    real = upload(functional.pad(planned, (num_prompt, 0), value=True), device)
    return Layout(visible, positions, real, readout)


def _used(query_lengths: Tensor, width: int, item_mask: Tensor, step_mask: Tensor) -> Tensor:
    """Return the mask [B, T (W + 1)] of the slots behind the prompt that hold a token or item."""
    words = torch.arange(width, device=step_mask.device) < query_lengths[..., None]
    return (torch.cat([words, item_mask[..., None]], 2) & step_mask[..., None]).flatten(1)


def other_group_steps(group: Tensor, step_mask: Tensor) -> Tensor:
    """[B, T, T]: column is an existing earlier step of another group than the row."""
    num_steps = group.shape[1]
    order = torch.arange(num_steps, device=group.device)
    earlier = order[:, None] > order[None, :]
    return earlier & (group[:, :, None] != group[:, None, :]) & step_mask[:, None, :]


def num_query_slots(config: UserDecoderConfig, query_lengths: Tensor) -> int:
    """Return W: 1 for a pooled vector, or the length of the longest query in tokens."""
    if config.query_mode != "tokens":
        return 1
    return max(1, int(host_of(query_lengths).max()) if query_lengths.numel() else 1)


def _positions(
    kind: str, num_prompt: int, before: Tensor, step: Tensor, offset: Tensor, width: int
) -> Tensor:
    if kind == "interleaved":
        behind = num_prompt + before[:, step] * (width + 1) + offset
    elif kind == "query_last":
        behind = num_prompt + before[:, step] + torch.where(offset == width, 0, offset)
    else:
        behind = (num_prompt + step).expand(len(before), -1)
    prompt = torch.arange(num_prompt, device=before.device).expand(len(before), -1)
    return torch.cat([prompt, behind], 1)

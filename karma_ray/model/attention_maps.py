"""Attention maps of both bodies, recorded in the same layers that train and serve.

While `recorded` is open, each layer computes its attention weights explicitly (without a fused
kernel) and stores them; adapters, autocast and sharding work as usual. Not for compiled layers.

Legend: U items, B windows, H heads, S slots, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from karma_ray.data.batch import Batch
from karma_ray.data.pixels import NO_PICTURE
from karma_ray.model.interest import InterestModel
from karma_ray.model.item_encoder import ItemEncoder
from karma_ray.model.layers import Attention


@dataclass(frozen=True)
class UserAttention:
    """Attention maps of the user decoder, and masks for reading them."""

    maps: list[Tensor]  # per layer [B, H, S, S]
    visible: Tensor  # [B, S, S] row attends to column; False for rows and columns of empty slots
    items: Tensor  # [B, S] slots of items


@contextmanager
def recorded(body: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that collects the attention [B, H, S, S] of each layer, in order."""
    maps: list[Tensor] = []

    def ask(
        module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**options, "packing": replace(options["packing"], maps=maps)}

    layers = [part for part in body.modules() if isinstance(part, Attention)]
    hooks = [layer.register_forward_pre_hook(ask, with_kwargs=True) for layer in layers]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def item_attention(encoder: ItemEncoder, tokens: Tensor, lengths: Tensor) -> list[Tensor]:
    """Return the maps per layer [U, H, S, S] over `instruction + tokens` [U, L].

    All items have equal lengths [U]. A multimodal encoder reads only their texts here.
    """
    with recorded(encoder.body) as maps:
        encoder.pooled(tokens, lengths, torch.full_like(lengths, NO_PICTURE))
    return maps


def user_attention(interest: InterestModel, batch: Batch, items: Tensor) -> UserAttention:
    """Return the maps over a batch's slots; `items` [U, D] are its items' embeddings."""
    user = interest.user_decoder
    prefix = interest.prefix(batch, items)
    with recorded(user.body) as maps:
        user.run(prefix)
    layout = prefix.layout
    visible = layout.visible & layout.real[:, :, None] & layout.real[:, None, :]
    num_windows, num_steps = batch.step_mask.shape
    num_prompt = len(user.prompt)
    blocks = layout.real[:, num_prompt:].view(num_windows, num_steps, -1)  # [B, T, W + 1]
    is_item = layout.real.new_zeros(blocks.shape)
    is_item[..., -1] = blocks[..., -1]
    slots = layout.real.new_zeros(layout.real.shape)
    slots[:, num_prompt:] = is_item.flatten(1)
    return UserAttention(maps, visible, slots)

"""Packing: the layers of a body compute only real tokens of a padded batch.

A padded batch [B, S] is reduced to its N real tokens, one row [1, N]. Norms, projections and
feed-forward layers, which are nearly all of the work, process no padding. Only attention needs the
rows: on a GPU a causal pass uses the variable-length kernel; otherwise queries, keys and values
are put back on the [B, S] grid for attention, and the real tokens are collected again.

Legend: B rows, S slots, N real tokens, H heads, K key/value heads, d head width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from karma_ray.data.batch import host_of, upload

# A finite value instead of minus infinity: exp(-1e9) is exactly 0 in every dtype, and rows that
# are fully masked stay finite.
HIDDEN = -1e9
KNOWS_SHARED_KEYS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether the variable-length kernel's wrapper takes fewer keys than queries (not PyTorch 2.11)."""


@dataclass(frozen=True)
class Packing:
    """Positions of the real tokens in a padded batch, and the attention mask."""

    real: Tensor  # [B, S]
    visible: Tensor | None = None  # [B, S, S] row attends to column; None: causal
    packed: bool = True
    maps: list[Tensor] | None = None  # if given, every layer appends its weights [B, H, S, S]

    @cached_property
    def index(self) -> Tensor:
        """Flat positions [N] of the real tokens."""
        return upload(host_of(self.real).flatten().nonzero().squeeze(1), self.real.device)

    @cached_property
    def starts(self) -> Tensor:
        """First packed token of each row, and the end [B + 1] int32."""
        ends = host_of(self.real).sum(1).cumsum(0)
        return upload(functional.pad(ends, (1, 0)).to(torch.int32), self.real.device)

    @cached_property
    def bias(self) -> Tensor:
        """Additive attention mask [B or 1, 1, 1, S, S]: 0 or nearly minus infinity."""
        size = self.real.shape[1]
        visible = self.visible
        if visible is None:
            visible = torch.ones(size, size, dtype=torch.bool, device=self.real.device).tril()[None]
        return bias_of(visible)

    def prepare(self) -> None:
        """Compute what a GPU's kernels read before the layers run, which may be compiled."""
        if self.packed and self.real.is_cuda:
            _ = self.index, self.starts

    def collect(self, grid: Tensor) -> Tensor:
        """Return the real tokens [N, ...] of a grid [B, S, ...]."""
        return cast(Tensor, _Collect.apply(grid.flatten(0, 1), self.index))  # type: ignore[no-untyped-call]

    def spread(self, tokens: Tensor) -> Tensor:
        """Put tokens [N, ...] back on the grid [B, S, ...], with zeros elsewhere."""
        flat = _Spread.apply(tokens, self.index, self.real.numel())  # type: ignore[no-untyped-call]
        return cast(Tensor, flat).view(*self.real.shape, *tokens.shape[1:])


class Continuation:
    """New slots [B, N] behind P earlier slots, whose keys and values are stored.

    The layers of a body call `extended` in their order, so one object serves one pass.
    """

    maps: None = None

    def __init__(self, past: Tensor, visible: Tensor) -> None:
        """`past` [L, 2, B, K, P, d] of every layer; `visible` [B, N, P + N]."""
        self.visible, self.bias = visible, bias_of(visible)
        self._past = iter(past)
        self.new: list[Tensor] = []
        """Of every layer that has run: keys and values [2, B, K, N, d] of the new slots."""

    def prepare(self) -> None:
        """Do nothing: there is nothing to compute before the layers run."""

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the earlier keys and values before those of the new slots, in every row."""
        self.new.append(torch.stack([key, value]))
        earlier = next(self._past)
        return torch.cat([earlier[0], key], 2), torch.cat([earlier[1], value], 2)


def bias_of(visible: Tensor) -> Tensor:
    """Return the additive mask [B, 1, 1, S, S'] of `visible` [B, S, S']: 0 or nearly -infinity."""
    bias = torch.zeros(visible.shape, dtype=torch.float32, device=visible.device)
    return bias.masked_fill_(~visible, HIDDEN)[:, None, None]


def worth_packing(real: Tensor) -> bool:
    """Whether the slots [B, S] have enough padding to make packing worthwhile."""
    count = int(host_of(real).sum())  # 0: the layers still run, because workers must stay in step
    return 0 < count < 0.8 * real.numel()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    packing: Packing | Continuation | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, called by transformers: [B, H, S, d], [B, K, S, d] -> [B, S, H, d].

    If `packing` is packed, rows are [1, H, N, d]. `attention_mask` is ignored: the mask is part
    of `packing`, and without it a row is causal. A Continuation puts earlier keys and values
    before the given ones.
    """
    if isinstance(packing, Continuation):
        key, value = packing.extended(key, value)
        return _on_grid(query, key, value, packing, scaling, dropout).transpose(1, 2), None
    if packing is None:
        everything = torch.ones(len(query), query.shape[2], dtype=torch.bool, device=query.device)
        packing = Packing(everything, packed=False)
    if not packing.packed:
        return _on_grid(query, key, value, packing, scaling, dropout).transpose(1, 2), None
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    causal = packing.visible is None and packing.maps is None
    if causal and query.is_cuda and query.dtype != torch.float32 and not dropout:
        return _variable_length(queries, keys, values, packing, scaling)[None], None
    grids = packing.spread(torch.cat([queries, keys, values], 1)).transpose(1, 2)
    heads, shared = query.shape[1], key.shape[1]
    grid_q, grid_k, grid_v = torch.split(grids, [heads, shared, shared], 1)
    states = _on_grid(grid_q, grid_k, grid_v, packing, scaling, dropout)
    return packing.collect(states.transpose(1, 2))[None], None


def _on_grid(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing | Continuation, scaling: float,
    dropout: float,
) -> Tensor:  # fmt: skip
    """[B, H, S, d], keys and values [B, K, S', d] -> [B, H, S, d]; S' > S in a continuation."""
    if query.is_cuda and packing.maps is None:
        return _fused(query, key, value, packing.visible, scaling, dropout)
    # On a CPU plain products are faster than the fused kernel at these lengths
    # (benchmarks/engine.py). Heads that share a key form one batched product, without copies.
    heads, shared = query.shape[1], key.shape[1]
    rows, _, slots, width = query.shape
    grouped = (query * scaling).reshape(rows, shared, heads // shared, slots, width)
    scores = grouped @ key[:, :, None].transpose(-1, -2)
    weights = (scores + packing.bias).softmax(-1, dtype=torch.float32)
    if packing.maps is not None:
        packing.maps.append(weights.detach().flatten(1, 2))
    weights = weights.to(value.dtype)
    weights = functional.dropout(weights, dropout) if dropout else weights
    return (weights @ value[:, :, None]).flatten(1, 2)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scaling: float,
    dropout: float,
) -> Tensor:  # fmt: skip
    """[B, H, S, d], [B, K, S, d] -> [B, H, S, d] by PyTorch's fused kernels on a GPU."""
    # Of these only the causal kernel of half precision knows shared keys; with a mask PyTorch
    # would silently take unfused products in float32.
    shared = visible is None and query.dtype != torch.float32
    if not shared:
        key, value = (_one_per_head(states, query.shape[1], 1) for states in (key, value))
    mask = None if visible is None else visible[:, None]
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
        scale=scaling, enable_gqa=shared,
    )  # fmt: skip


def _one_per_head(states: Tensor, heads: int, axis: int) -> Tensor:
    """Repeat the K keys or values along `axis` for the `heads` that share them."""
    return states.repeat_interleave(heads // states.shape[axis], axis)


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float
) -> Tensor:
    """Causal attention of packed rows on a GPU: [N, H, d], [N, K, d] -> [N, H, d]."""
    longest = packing.real.shape[1]
    options: dict[str, Any] = {"enable_gqa": True}
    if not KNOWS_SHARED_KEYS:
        options = {}
        key, value = (_one_per_head(states, query.shape[1], 1) for states in (key, value))
    return cast(
        Tensor,
        varlen_attn(
            query, key, value, packing.starts, packing.starts, longest, longest,
            scale=scaling, window_size=(-1, 0), **options,
        ),
    )  # fmt: skip


class _Collect(torch.autograd.Function):
    """Selects rows at distinct positions, so the gradient is copied instead of accumulated."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(flat)
        return flat.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (index,) = ctx.saved_tensors
        spread = gradient.new_zeros((ctx.rows, *gradient.shape[1:]))
        return spread.index_copy_(0, index, gradient), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return tokens.new_zeros((rows, *tokens.shape[1:])).index_copy_(0, index, tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        (index,) = ctx.saved_tensors
        return gradient.index_select(0, index), None, None

"""Packing: a body's layers run on exactly the real tokens, whatever the padded shape says.

A padded batch [B, S] is cut down to its N real tokens, one row [1, N]. Norms, projections and
feed-forward layers, nearly all of the work, see no padding at all. Only attention needs to know
the rows: on a GPU a causal pass uses the variable-length kernel, everything else spreads
queries, keys and values over the [B, S] grid again, attends there and collects the real tokens.

Legend: B rows, S slots, N real tokens, H heads, K key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

# A finite "minus infinity": exp(-1e9) is exactly 0 in every dtype, and a fully masked
# padding row stays finite.
HIDDEN = -1e9


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a padded batch lie, and the attention mask."""

    real: Tensor  # [B, S]
    visible: Tensor | None = None  # [B, S, S] row sees column; None: causal
    packed: bool = True
    maps: list[Tensor] | None = None  # every layer adds its weights [B, H, S, S], if there is one

    @cached_property
    def index(self) -> Tensor:
        """Flat positions [N] of the real tokens."""
        return self.real.flatten().nonzero().squeeze(1)

    @cached_property
    def starts(self) -> Tensor:
        """Where each row begins among the packed tokens, and the end [B + 1] int32."""
        return functional.pad(self.real.sum(1).cumsum(0), (1, 0)).to(torch.int32)

    @cached_property
    def bias(self) -> Tensor:
        """Additive mask [B or 1, 1, 1, S, S]: 0 or minus infinity."""
        size = self.real.shape[1]
        visible = self.visible
        if visible is None:
            visible = torch.ones(size, size, dtype=torch.bool, device=self.real.device).tril()[None]
        bias = torch.zeros(visible.shape, dtype=torch.float32, device=visible.device)
        return bias.masked_fill_(~visible, HIDDEN)[:, None, None]

    def collect(self, grid: Tensor) -> Tensor:
        """[B, S, ...] -> the real tokens [N, ...]."""
        return cast(Tensor, _Collect.apply(grid.flatten(0, 1), self.index))  # type: ignore[no-untyped-call]

    def spread(self, tokens: Tensor) -> Tensor:
        """Tokens [N, ...] -> [B, S, ...], zero where there is none."""
        flat = _Spread.apply(tokens, self.index, self.real.numel())  # type: ignore[no-untyped-call]
        return cast(Tensor, flat).view(*self.real.shape, *tokens.shape[1:])


def worth_packing(real: Tensor) -> bool:
    """Whether enough of the slots [B, S] is padding to pay for collecting and spreading."""
    count = int(real.sum())  # none at all: the layers still run, for workers must keep in step
    return 0 < count < 0.8 * real.numel()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, called by transformers: [B, H, S, d], [B, K, S, d] -> [B, S, H, d].

    With a packed `packing` rows are [1, H, N, d]. `attention_mask` is not used: the mask stands
    in `packing`, and without it a row is causal.
    """
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
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float, dropout: float
) -> Tensor:
    """[B, H, S, d], [B, K, S, d] -> [B, H, S, d]."""
    if query.is_cuda and packing.maps is None:
        mask = None if packing.visible is None else packing.visible[:, None]
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
            scale=scaling, enable_gqa=True,
        )  # fmt: skip
    # On a CPU at these lengths plain products beat the fused kernel (benchmarks/engine.py). Heads
    # that share a key are one batched product: keys are not repeated.
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


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float
) -> Tensor:
    """Causal attention of packed rows on a GPU: [N, H, d], [N, K, d] -> [N, H, d]."""
    from torch.nn.attention.varlen import varlen_attn

    longest = packing.real.shape[1]
    return cast(
        Tensor,
        varlen_attn(
            query, key, value, packing.starts, packing.starts, longest, longest,
            scale=scaling, window_size=(-1, 0), enable_gqa=True,
        ),
    )  # fmt: skip


class _Collect(torch.autograd.Function):
    """Rows at distinct positions; the gradient is copied, where index_select would add it."""

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

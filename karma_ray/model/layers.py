"""Norm and attention layers with fewer passes over memory, for weights of transformers' layers.

At small widths and for the short rows of item texts, half of a step is spent on casts and
element-wise products instead of matrix products (benchmarks/engine.py prints the shares). Under
autocast a stock layer casts a norm's output once for each projection that reads it, and rotates
queries and keys in float32. Here a norm returns the compute type directly, and its backward pass
is written by hand.

Legend: B rows, S slots, H heads, d head width, D width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from karma_ray.model.packing import Continuation, Packing, attend


class RMSNorm(nn.Module):
    """y = weight * x / rms(x) (1910.07467), in the compute type; statistics are float32."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        kind = x.device.type
        wanted = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if x.device.type != "cpu" or torch.compiler.is_compiling():  # already fused there
            return functional.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).to(wanted)
        return cast(Tensor, _Norm.apply(x, self.weight, self.eps, wanted))  # type: ignore[no-untyped-call]


class Attention(nn.Module):
    """Self-attention around `packing.attend`, with a norm of queries and keys where there is one.

    The projections may have biases and contain adapters.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        parts = cast(Any, stock)
        self.q_proj, self.k_proj, self.v_proj = parts.q_proj, parts.k_proj, parts.v_proj
        self.o_proj = parts.o_proj
        self.q_norm, self.k_norm = (
            fast_norm(getattr(parts, name)) if hasattr(parts, name) else nn.Identity()
            for name in ("q_norm", "k_norm")
        )
        self.width, self.scaling = int(parts.head_dim), float(parts.scaling)
        self.attention_dropout = float(parts.attention_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        packing: Packing | Continuation | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """[B, S, D] -> [B, S, D]; called by the layer in place of the stock module."""
        shape = (*hidden_states.shape[:-1], -1, self.width)
        query = self.q_norm(self.q_proj(hidden_states).view(shape))  # [B, S, H, d]
        key = self.k_norm(self.k_proj(hidden_states).view(shape))
        value = self.v_proj(hidden_states).view(shape)
        cos, sin = (table[:, :, None].to(query.dtype) for table in position_embeddings)
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        states, _ = attend(
            self, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
            attention_mask, self.scaling, self.attention_dropout if self.training else 0.0, packing,
        )  # fmt: skip
        joined = states.reshape(*hidden_states.shape[:-1], -1)
        return cast(Tensor, self.o_proj(joined)), None


def fast_norm(stock: nn.Module) -> RMSNorm:
    """Return an RMSNorm of this module with a stock norm's weight."""
    parts = cast(Any, stock)
    return RMSNorm(parts.weight, float(parts.variance_epsilon))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding (2104.09864) to [B, S, H, d]; cos and sin [B, S, 1, d]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class _Norm(torch.autograd.Function):
    """With r = 1 / rms(x): dw = sum g x r;  dx = r (g w) - x r^3 mean(g w x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, wanted: torch.dtype) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_exact(x))
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        unit = x * scale
        if unit.dtype == wanted:
            return cast(Tensor, unit.mul_(weight))
        out = torch.empty(x.shape, dtype=wanted, device=x.device)
        return torch.mul(unit, weight, out=out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        (gradient,) = gradients
        exact, width = scale.dtype, x.shape[-1]
        product = (gradient * x).to(exact).reshape(-1, width)
        flat = scale.flatten()
        of_weight = product.T @ flat if ctx.needs_input_grad[1] else None
        along = (product @ weight).mul_(flat.pow(3)).div_(width).view(scale.shape)
        of_x = (gradient * weight).mul_(scale).addcmul_(x.to(exact), along, value=-1)
        return of_x.to(x.dtype), of_weight, None, None


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32

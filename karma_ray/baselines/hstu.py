"""HSTU's network: pointwise aggregated attention with gates, and no softmax (2402.17152).

Legend: B windows, S slots, H heads, D width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from karma_ray.baselines.sasrec import joined_heads, split_heads
from karma_ray.model.config import IdModelConfig


class Hstu(nn.Module):
    """Residual blocks; positions enter only through the bias of each block."""

    def __init__(self, config: IdModelConfig, num_slots: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(HstuBlock(config, num_slots) for _ in range(config.num_layers))

    def forward(self, tokens: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
        """[B, S, D], attention mask [B, S, S], [B, S] -> states [B, S, D]."""
        # Visible columns never have a later position; the bias of the others is not used.
        distance = (positions[:, :, None] - positions[:, None, :]).clamp(min=0)
        for block in self.blocks:
            tokens = block(tokens, visible, distance)
        return tokens


class HstuBlock(nn.Module):
    """U, V, Q, K = split(SiLU(f1(Norm(x))));  A V = SiLU(Q K^T + rab) V / n;
    x + f2(Norm(A V) * U), the paper's equations 1 to 3.

    `rab` is the bias of the relative position, shared by the heads of a block as in the authors'
    code. The bias of the relative time is left out, because batches have no times. n is the
    largest number of slots instead of the batch's, so that padding has no effect.
    """

    def __init__(self, config: IdModelConfig, num_slots: int) -> None:
        super().__init__()
        self.config, self.num_slots = config, num_slots
        self.f1 = nn.Linear(config.width, 4 * config.width, bias=False)
        self.f2 = nn.Linear(config.width, config.width)
        self.position_bias = nn.Parameter(0.02 * torch.randn(num_slots))

    def forward(self, x: Tensor, visible: Tensor, distance: Tensor) -> Tensor:
        """[B, S, D], [B, S, S], distance between row and column [B, S, S] -> [B, S, D]."""
        normed = functional.layer_norm(x, x.shape[-1:], eps=1e-6)
        gate, *parts = functional.silu(self.f1(normed)).chunk(4, -1)
        value, query, key = (split_heads(part, self.config.num_heads) for part in parts)
        scores = query @ key.transpose(-1, -2) + self.position_bias[distance][:, None]
        weights = functional.silu(scores) * visible[:, None] / self.num_slots
        pooled = joined_heads(weights.to(value.dtype) @ value)
        pooled = functional.layer_norm(pooled, pooled.shape[-1:], eps=1e-6)
        gated = functional.dropout(pooled * gate, self.config.dropout, self.training)
        return cast(Tensor, x + self.f2(gated))

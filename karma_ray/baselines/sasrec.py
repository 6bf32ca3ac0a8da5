"""SASRec's network: causal self-attention over learned absolute positions (1808.09781).

Legend: B windows, S slots, D width.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from karma_ray.model.config import IdModelConfig


class SasRec(nn.Module):
    """x = tokens sqrt(D) + P;  x = x + Drop(Att(Norm(x)));  x = x + Drop(FFN(Norm(x)));  Norm(x).

    Section III: residual, norm and dropout as in its equation g(x), and a point-wise feed-forward
    network of two D x D layers with ReLU. The factor sqrt(D) is from the authors' code.
    """

    def __init__(self, config: IdModelConfig, num_slots: int) -> None:
        super().__init__()
        self.config = config
        self.positions = nn.Embedding(num_slots, config.width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList(SasRecBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-8)

    def forward(self, tokens: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
        """[B, S, D], attention mask [B, S, S], [B, S] -> states [B, S, D]."""
        x = tokens * math.sqrt(self.config.width) + self.positions(positions)
        x = functional.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, visible)
        return cast(Tensor, self.norm(x))


class SasRecBlock(nn.Module):
    """Scaled dot-product attention (equation 2), then the feed-forward network (equation 4)."""

    def __init__(self, config: IdModelConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.attention_norm, self.feed_norm = (nn.LayerNorm(width, eps=1e-8) for _ in range(2))
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """[B, S, D], [B, S, S] -> [B, S, D]."""
        dropout = self.config.dropout
        x = x + functional.dropout(self._attended(x, visible), dropout, self.training)
        hidden = functional.relu(self.inner(self.feed_norm(x)))
        hidden = self.outer(functional.dropout(hidden, dropout, self.training))
        return x + functional.dropout(hidden, dropout, self.training)

    def _attended(self, x: Tensor, visible: Tensor) -> Tensor:
        normed, heads = self.attention_norm(x), self.config.num_heads
        query, key, value = (
            split_heads(layer(normed), heads) for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        weights = functional.dropout(weights, self.config.dropout, self.training)
        return joined_heads(weights.to(value.dtype) @ value)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, D] -> [B, H, S, D / H]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def joined_heads(x: Tensor) -> Tensor:
    """[B, H, S, D / H] -> [B, S, D]."""
    return x.transpose(1, 2).flatten(2)

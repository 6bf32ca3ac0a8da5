"""The small new modules around the two LLMs: projector, query embedding and score.

Legend: D width, N any leading shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from karma_ray.model.config import ScoreConfig


def rms_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Parameter-free RMSNorm over the last dimension, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@dataclass(frozen=True)
class Whitening:
    """Mean [d] and principal axes (the columns of [d, d]) of states, weakest first, in float64."""

    mean: Tensor
    axes: Tensor
    variances: Tensor  # [d]
    scales: Tensor  # [d]; a state's component along an axis times its scale has variance 1

    @classmethod
    def of(cls, states: Tensor, ridge: float) -> Whitening:
        """Fit states [n, d]; `ridge`, a share of the largest variance, is added to every variance,
        so that rounding noise is not amplified."""
        states = states.double()
        centred = states - states.mean(0)
        variances, axes = torch.linalg.eigh(centred.T @ centred / len(states))
        raised = variances.clamp(min=0) + ridge * variances.max()
        return cls(states.mean(0), axes, variances, raised.clamp(min=1e-30).rsqrt())


class SoftToken(nn.Module):
    """Vectors [N, width] -> soft tokens [N, D] at the scale of the LLM's input-embedding rows.

    RMSNorm (projector only) -> Linear -> GELU -> Linear (xRAG's projector). Method 1.3 matches
    the scale, because continuous tokens do not lie among the embedding rows.
    """

    scale: Tensor

    def __init__(self, width: int, embedding_rows: Tensor, *, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        own = embedding_rows.shape[1]
        self.inner = nn.Linear(width, own)
        self.outer = nn.Linear(own, own)
        scale = embedding_rows.detach().float().pow(2).mean().sqrt()
        self.register_buffer("scale", scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, width] -> [N, D]."""
        # Without a norm the input is divided by a constant to unit scale: at the scale of an
        # embedding row (0.02 to 0.05) the first layer's bias would dominate it.
        hidden = rms_normalize(x) if self.normalize else x / self.scale
        return rms_normalize(self.outer(functional.gelu(self.inner(hidden)))) * self.scale


class Score(nn.Module):
    """score(h, e) = query_vectors(h) . index_vectors(e), method 1.4.

    The same two maps are used in training, evaluation, the index and serving.
    """

    def __init__(self, config: ScoreConfig, width: int) -> None:
        super().__init__()
        self.config = config
        if config.kind == "dot":
            self.interest_norm = nn.RMSNorm(width, eps=1e-6)
            self.item_norm = nn.RMSNorm(width, eps=1e-6)
        elif config.kind == "cos_learned":
            self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def query_vectors(self, interest: Tensor) -> Tensor:
        """Map h [N, D] to the query vectors of the score [N, D]."""
        interest = interest.float()
        if self.config.kind == "dot":
            return cast(Tensor, self.interest_norm(interest))
        unit = functional.normalize(interest, dim=-1)
        if self.config.kind == "cos_learned":
            return unit * self.log_scale.exp().clamp(max=100.0)
        return unit * self.config.scale

    def index_vectors(self, items: Tensor) -> Tensor:
        """Map e [N, D] to the vectors that an index stores [N, D]."""
        items = items.float()
        if self.config.kind == "dot":
            return cast(Tensor, self.item_norm(items))
        return functional.normalize(items, dim=-1)

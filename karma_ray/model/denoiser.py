"""The denoising network g_psi of method 1.9: an MLP that is applied to each token separately.

It is MAR's diffusion head (2406.11838, SimpleMLPAdaLN): time and condition modulate the norms of
the residual blocks. Modulations and output start at zero, so that at first every block is the
identity and the output is 0.

Legend: N examples, V tokens, d token width, C condition width, w width of the blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from karma_ray.errors import InputError
from karma_ray.objectives.denoising import Times
from karma_ray.ranges import Count, CountOrZero, Weight

FREQUENCIES = 256


@dataclass(frozen=True)
class DenoiserConfig:
    """The network, and the times used by flow matching in training and sampling."""

    num_layers: Count = 3
    """Residual blocks (MAR has 12)."""
    width: CountOrZero = 0
    """Width w of the blocks; 0: the larger of token and condition width. With less than the
    token width the noise would not pass through (RAE, 2510.11690)."""
    times: Times = "uniform"
    """Times t for training flow matching: uniform, or logit-normal (2403.03206), which prefers
    the middle. Other heads have fixed times."""
    shift: Weight = 0.0
    """Flow matching's a in t' = a t / (1 + (a - 1) t), in training and sampling; a > 1 gives more
    noise. 0: sqrt(N_v d_v / 4096) from the dimensions of a target, at least 1 (RAE,
    2510.11690)."""

    def check(self, path: str, head: str) -> None:
        """Raise InputError on settings that the head does not have; `path` leads to this config."""
        for name, default in (("times", "uniform"), ("shift", 0.0)):
            if head != "fm" and getattr(self, name) != default:
                message = f"is a setting of flow matching (fm); the head is {head!r}"
                raise InputError(f"{path}.{name}", getattr(self, name), message)


class Denoiser(nn.Module):
    """(noisy, time, condition) -> the variant's prediction, token by token; see
    `objectives.denoising.Network`."""

    def __init__(
        self, token_width: int, condition_width: int, config: DenoiserConfig, *,
        sees_noise: bool = True,
    ) -> None:  # fmt: skip
        """Without `sees_noise` (regression) the output layer is initialised at random. With a
        constant input a zero output layer would learn many times slower."""
        super().__init__()
        width = config.width or max(token_width, condition_width)
        self.into = nn.Linear(token_width, width)
        self.condition = nn.Linear(condition_width, width)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(config.num_layers))
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, token_width)
        for layer in (self.modulation, self.output) if sees_noise else (self.modulation,):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """[N, V, d], [N], [N, V, C] -> [N, V, d]."""
        told = self.time(time_features(time))[:, None] + self.condition(condition)
        told = functional.silu(told)
        hidden = self.into(noisy)
        for block in self.blocks:
            hidden = block(hidden, told)
        shift, scale = self.modulation(told).chunk(2, -1)
        return cast(Tensor, self.output(_modulated(hidden, shift, scale)))


class _Block(nn.Module):
    """x + gate * MLP(modulated LN(x)); all three modulations start at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, hidden: Tensor, told: Tensor) -> Tensor:
        """[N, V, w], [N, V, w] -> [N, V, w]."""
        shift, scale, gate = self.modulation(told).chunk(3, -1)
        inner = self.norm(hidden) * (1 + scale) + shift
        return cast(Tensor, hidden + gate * self.mlp(inner))


def time_features(time: Tensor) -> Tensor:
    """Sinusoids [N, 256] of times [N], wavelengths from 2 pi to 20000 pi (1706.03762)."""
    half = FREQUENCIES // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half, device=time.device) / half)
    angles = time.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def _modulated(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply the last LayerNorm, without weights, then scale and shift."""
    normed = functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
    return normed * (1 + scale) + shift

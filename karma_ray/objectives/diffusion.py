"""The interface of all diffusion variants in `denoising`: one loss, and one way to sample.

Legend: N examples, V tokens of each, d width, C width of the condition.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy [N, V, d], time [N] up to 1000 in size, condition [N, V, C]) -> [N, V, d]."""

TIME_SCALE = 1000.0
"""Scale of the times that networks get in all variants, that of DDPM's 1000 steps."""


@dataclass(frozen=True)
class Noised:
    """Input and target of the network."""

    noisy: Tensor  # [N, V, d]
    time: Tensor  # [N]
    target: Tensor  # [N, V, d]
    weight: Tensor  # [N]


class Denoising(ABC):
    """Training and sampling of a conditional generator; variants are final dataclasses."""

    @abstractmethod
    def noise(self, clean: Tensor, level: Tensor, eps: Tensor) -> Noised:
        """Add noise to clean [N, V, d], with level [N] from U(0, 1) and eps [N, V, d] from N(0, I).

        The draws are arguments, so that they can depend on the row's key.
        """

    @abstractmethod
    def denoise(
        self, network: Network, condition: Tensor, eps: Tensor, steps: int | None = None
    ) -> Tensor:
        """Turn eps [N, V, d] ~ N(0, I) into a sample in `steps` steps (None: the default)."""

    def loss(
        self, network: Network, clean: Tensor, condition: Tensor, level: Tensor, eps: Tensor
    ) -> Tensor:
        """[N, V, d], [N, V, C], [N], [N, V, d] -> [N], the mean over tokens and dimensions.

        Equation 8; its scale is about 1 for any V d. Computed in float32.
        """
        noised = self.noise(clean.float(), level.float(), eps.float())
        answer = network(noised.noisy, noised.time, condition).float()
        return noised.weight * (answer - noised.target).square().flatten(1).mean(1)

    @torch.no_grad()
    def sample(
        self,
        network: Network,
        condition: Tensor,
        shape: tuple[int, ...],
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw a sample of shape [N, V, d] for condition [N, V, C]; `generator` on its device."""
        eps = torch.randn(shape, generator=generator, device=condition.device)
        return self.denoise(network, condition, eps, steps)


def standard_normal(level: Tensor) -> Tensor:
    """Convert U(0, 1) to N(0, 1) by the inverse distribution; finite at both ends."""
    return cast(Tensor, torch.special.ndtri(level.clamp(1e-6, 1 - 1e-6)))


def spread_over(values: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N, 1, 1]."""
    return values.view(-1, *[1] * (like.dim() - 1))

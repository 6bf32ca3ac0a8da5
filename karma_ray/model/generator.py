"""Table 2 (METHOD 1.12): what a request searches with is generated from h_t, not h_t itself.

A head learns p(z | h_t), z the standardised embedding of the item that was clicked. The target
never gets a gradient: items could else all become the same, and the loss 0.

EDM at its largest noise and flow matching at t = 1 answer E[z | h_t] in one step, as regression
does; more steps go from the mean of what could be clicked to one of its modes.

Legend: N trained steps, B requests, K samples, G items of a step, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from karma_ray.data.draws import GEN_LEVEL, GEN_NOISE, SERVED, hashed, normal, uniform
from karma_ray.model.adapters import rms_normalize
from karma_ray.model.config import GeneratorConfig
from karma_ray.model.denoiser import Denoiser
from karma_ray.objectives.denoising import denoising

MOMENTUM = 0.99
"""Of the running mean and deviation of item embeddings, after as many steps."""
ORIGIN = 20_260_322
"""Seed of the noise that one-step estimates start from."""


class Generator(nn.Module):
    """The head and the statistics of its targets."""

    mean: Tensor  # [D]
    square: Tensor  # [D]
    seen: Tensor  # scalar: steps observed
    origin: Tensor  # [1, D]

    def __init__(self, config: GeneratorConfig, width: int) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.denoising = denoising(config.kind, config.denoiser.times, config.denoiser.shift)
        self.head = Denoiser(width, width, config.denoiser, sees_noise=config.kind != "mse")
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("square", torch.ones(width))
        self.register_buffer("seen", torch.zeros(()))
        stream = torch.Generator().manual_seed(ORIGIN)
        origin = torch.randn(1, width, generator=stream)
        self.register_buffer("origin", origin, persistent=False)

    @property
    def is_random(self) -> bool:
        """Whether noise decides what is generated: not in a regression."""
        return self.config.kind != "mse"

    @property
    def num_draws(self) -> int:
        """Times and noises for each trained step."""
        return 1 if self.config.kind == "mse" else self.config.draws

    def resampled(self, samples: int, agg: str, steps: int) -> Generator:
        """The same weights, sampled another way."""
        fields: dict[str, Any] = {"samples": samples, "agg": agg, "steps": steps}
        made = Generator(replace(self.config, **fields), len(self.mean))
        made.load_state_dict(self.state_dict())
        return made.to(self.mean.device).train(self.training)

    @torch.no_grad()
    def observe(self, items: Tensor) -> None:
        """Follow the mean and deviation of item embeddings, e [G, D] of a step on all workers."""
        keep = torch.clamp(self.seen / (self.seen + 1), max=MOMENTUM)
        items = items.float()
        self.mean.lerp_(items.mean(0), 1 - keep)
        self.square.lerp_(items.square().mean(0), 1 - keep)
        self.seen += 1

    def losses(self, interest: Tensor, targets: Tensor, keys: np.ndarray) -> Tensor:
        """Loss [N] of h [N, D] against e [N, D] of the clicked items, made in float32.

        Noises and levels are drawn by `keys` [N], so that neither workers nor micro-batches change
        them; the levels of a step are one from each of `num_draws` equal parts.
        """
        draws, device = self.num_draws, interest.device
        levels = (uniform(keys, GEN_LEVEL)[:, None] + np.arange(draws)) / draws
        level = torch.from_numpy(levels).flatten().to(device, torch.float32)
        noise = normal(hashed(keys, GEN_NOISE), (draws, 1, interest.shape[-1]), device)
        clean = self._standardised(targets.detach()).repeat_interleave(draws, 0)[:, None]
        told = interest.repeat_interleave(draws, 0)[:, None]
        values = self.denoising.loss(self.head, clean, told, level, noise.flatten(0, 1))
        return values.view(-1, draws).mean(1)

    def estimate(self, interest: Tensor) -> Tensor:
        """h [..., D] -> E[e | h] [..., D] by one step of the sampler, with gradient."""
        rows = interest.flatten(0, -2)
        noise = self.origin.expand(len(rows), -1)
        return self._restored(self._drawn(rows, noise, steps=1)).view_as(interest)

    @torch.no_grad()
    def search_with(self, interest: Tensor, keys: np.ndarray | None = None) -> Tensor:
        """h [B, D] and keys [B] of the requests -> what they search with [B, K or 1, D].

        Noise is drawn by the key of a request: it gets the same answer in any company, and
        requests of other keys do not share its luck. Raises ValueError without keys where it
        matters.
        """
        samples = self._samples(interest, keys)
        return self._restored(
            samples.mean(1, keepdim=True) if self.config.agg == "mean" else samples
        )

    @torch.no_grad()
    def deviation(self, interest: Tensor, keys: np.ndarray | None = None) -> float:
        """How wide samples are: their standard deviation over requests and draws, the items' being
        1; mean over dimensions.

        Well above 1 the sampler is at fault, not what was learnt; well below, samples are means.
        """
        return float(self._samples(interest, keys).flatten(0, 1).std(0).mean())

    def _samples(self, interest: Tensor, keys: np.ndarray | None) -> Tensor:
        """Standardised embeddings [B, K, D]."""
        config, shape = self.config, (self.config.samples, interest.shape[-1])
        if not self.is_random:
            noise = interest.new_zeros(len(interest), *shape)
        elif keys is None:
            raise ValueError("a model that draws needs the keys of the requests")
        else:  # on the CPU, whose draws are the same wherever the model runs
            noise = normal(hashed(keys, SERVED), shape, "cpu").to(interest.device)  # [B, K, D]
        return torch.stack(
            [self._drawn(interest, draw, config.steps or None) for draw in noise.unbind(1)], 1
        )

    def _drawn(self, interest: Tensor, noise: Tensor, steps: int | None) -> Tensor:
        """A standardised embedding [B, D] for each h [B, D], from noise [B, D]."""
        return self.denoising.denoise(self.head, interest[:, None], noise[:, None], steps)[:, 0]

    def _deviation(self) -> Tensor:
        return (self.square - self.mean.square()).clamp(min=1e-6).sqrt()

    def _standardised(self, items: Tensor) -> Tensor:
        return (items.float() - self.mean) / self._deviation()

    def _restored(self, samples: Tensor) -> Tensor:
        """Back on the sphere that the item encoder's embeddings lie on."""
        return rms_normalize(samples * self._deviation() + self.mean)

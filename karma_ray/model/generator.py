"""Generation of the search vector from h_t, for Table 2 (method 1.12).

A head learns p(z | h_t), where z is the standardised embedding of the clicked item. The target
never gets a gradient; otherwise all items could become equal, with a loss of 0.

EDM at its largest noise and flow matching at t = 1 return E[z | h_t] in one step, as regression
does. More steps move from the mean of possible clicks to one of its modes.

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
"""Momentum of the running mean and deviation of item embeddings, after the first steps."""
ORIGIN = 20_260_322
"""Seed of the noise that one-step estimates start from."""


class Generator(nn.Module):
    """The generating head, and the statistics of its targets."""

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
        """Whether the generated vectors depend on noise; those of a regression do not."""
        return self.config.kind != "mse"

    @property
    def num_draws(self) -> int:
        """Number of times and noises per trained step."""
        return 1 if self.config.kind == "mse" else self.config.draws

    def resampled(self, samples: int, agg: str, steps: int) -> Generator:
        """Return a copy with the same weights and other sampling settings."""
        fields: dict[str, Any] = {"samples": samples, "agg": agg, "steps": steps}
        made = Generator(replace(self.config, **fields), len(self.mean))
        made.load_state_dict(self.state_dict())
        return made.to(self.mean.device).train(self.training)

    @torch.no_grad()
    def observe(self, items: Tensor) -> None:
        """Update the mean and deviation of item embeddings with e [G, D] of a step."""
        keep = torch.clamp(self.seen / (self.seen + 1), max=MOMENTUM)
        items = items.float()
        self.mean.lerp_(items.mean(0), 1 - keep)
        self.square.lerp_(items.square().mean(0), 1 - keep)
        self.seen += 1

    def losses(self, interest: Tensor, targets: Tensor, keys: np.ndarray) -> Tensor:
        """Return the loss [N] of h [N, D] for e [N, D] of the clicked items, in float32.

        Noises and noise levels are drawn from `keys` [N], so that they do not depend on workers
        or micro-batches. The levels of a step are stratified into `num_draws` equal parts.
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
        """Estimate E[e | h] [..., D] from h [..., D] by one sampler step, with gradient."""
        rows = interest.flatten(0, -2)
        noise = self.origin.expand(len(rows), -1)
        return self._restored(self._drawn(rows, noise, steps=1)).view_as(interest)

    @torch.no_grad()
    def search_with(self, interest: Tensor, keys: np.ndarray | None = None) -> Tensor:
        """Map h [B, D] and request keys [B] to the search vectors [B, K or 1, D].

        Noise is drawn from the key of a request, so its answer does not depend on other requests
        in the batch. Raises ValueError if keys are needed and missing.
        """
        samples = self._samples(interest, keys)
        return self._restored(
            samples.mean(1, keepdim=True) if self.config.agg == "mean" else samples
        )

    @torch.no_grad()
    def deviation(self, interest: Tensor, keys: np.ndarray | None = None) -> float:
        """Return the standard deviation of samples over requests and draws, averaged over
        dimensions; that of the items is 1.

        A value well above 1 points to the sampler; one well below 1 means that samples are means.
        """
        return float(self._samples(interest, keys).flatten(0, 1).std(0).mean())

    def _samples(self, interest: Tensor, keys: np.ndarray | None) -> Tensor:
        """Draw standardised embeddings [B, K, D]."""
        config, shape = self.config, (self.config.samples, interest.shape[-1])
        if not self.is_random:
            noise = interest.new_zeros(len(interest), *shape)
        elif keys is None:
            raise ValueError("a model that draws noise needs the keys of the requests")
        else:  # on the CPU, so that the draws are equal on every device
            noise = normal(hashed(keys, SERVED), shape, "cpu").to(interest.device)  # [B, K, D]
        return torch.stack(
            [self._drawn(interest, draw, config.steps or None) for draw in noise.unbind(1)], 1
        )

    def _drawn(self, interest: Tensor, noise: Tensor, steps: int | None) -> Tensor:
        """Generate a standardised embedding [B, D] for each h [B, D], from noise [B, D]."""
        return self.denoising.denoise(self.head, interest[:, None], noise[:, None], steps)[:, 0]

    def _deviation(self) -> Tensor:
        return (self.square - self.mean.square()).clamp(min=1e-6).sqrt()

    def _standardised(self, items: Tensor) -> Tensor:
        return (items.float() - self.mean) / self._deviation()

    def _restored(self, samples: Tensor) -> Tensor:
        """Undo the standardisation, and normalise as the item encoder does."""
        return rms_normalize(samples * self._deviation() + self.mean)

"""Diffusion of a vector under a condition (method 1.9): adding noise, prediction and sampling.

The variants differ in the network's target, but not in the loss: with `Noised` as returned by
`noise()`, it is weight * ||network(noisy, time, condition) - target||^2, and the sampler inverts
the noise. All data are standardised (unit variance per dimension).

    z0 = clean, eps ~ N(0, I):    flow    x_t = (1 - t) z0 + t eps              target eps - z0
                                  DDPM    x_t = sqrt(abar) z0 + sqrt(1-abar) eps  target eps, v, z0
                                  EDM     x_s = z0 + s eps         target (z0 - c_skip x) / c_out

Legend: N examples, V tokens of each, d width, C width of the condition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from karma_ray.objectives.diffusion import (
    TIME_SCALE,
    Denoising,
    Network,
    Noised,
    spread_over,
    standard_normal,
)

Times = Literal["uniform", "logit_normal"]

REFERENCE_DIMS = 4096
"""Dimensions at which flow matching's time is not shifted (RAE, 2510.11690)."""


@dataclass(frozen=True)
class FlowMatching(Denoising):
    """Straight paths from data to noise (2210.02747); the network predicts their velocity."""

    shift: float = 0.0
    """a in t' = a t / (1 + (a - 1) t); 0: sqrt(V d / 4096), at least 1 (RAE, 2510.11690)."""
    times: Times = "uniform"
    """Distribution of t before the shift: U(0, 1), or sigmoid of N(0, 1) (2403.03206)."""

    def noise(self, clean: Tensor, level: Tensor, eps: Tensor) -> Noised:
        """x_t = (1 - t) z0 + t eps, target eps - z0; t = 1 is noise."""
        if self.times == "logit_normal":
            level = torch.sigmoid(standard_normal(level))
        time = self.shifted(level, clean.shape[1:])
        t = spread_over(time, clean)
        return Noised(
            (1 - t) * clean + t * eps, time * TIME_SCALE, eps - clean, torch.ones_like(level)
        )

    def denoise(
        self, network: Network, condition: Tensor, eps: Tensor, steps: int | None = None
    ) -> Tensor:
        """Sample by Euler's method, 25 steps, t from 1 to 0 on the shifted grid."""
        grid = torch.linspace(1, 0, (steps or 25) + 1, device=eps.device)
        x, times = eps, self.shifted(grid, eps.shape[1:])
        for now, following in pairwise(times):
            velocity = network(x, now.expand(len(x)) * TIME_SCALE, condition).float()
            x = x - (now - following) * velocity
        return x

    def shifted(self, time: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return t' for times t [N] and examples of this shape."""
        a = self.shift or max(1.0, math.sqrt(math.prod(shape) / REFERENCE_DIMS))
        return a * time / (1 + (a - 1) * time)


@dataclass(frozen=True)
class DDPM(Denoising):
    """1000 steps on the cosine schedule (2006.11239, 2102.09672), sampled by DDIM (2010.02502)."""

    prediction: Literal["eps", "v", "x0"] = "eps"
    """What the network predicts: the noise, v = sqrt(abar) eps - sqrt(1 - abar) z0, or z0."""
    num_times: int = 1000
    """Steps of the chain."""
    start: int = 980
    """First time of the sampler: at t = 999, abar is 2.4e-9, and an error of 1 % in eps would make
    samples six times too wide."""

    def noise(self, clean: Tensor, level: Tensor, eps: Tensor) -> Noised:
        """x_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps, t uniform over the steps."""
        time = (level * self.num_times).long().clamp(max=self.num_times - 1)
        signal, spread = self._scales(time, clean)
        targets = {"eps": eps, "v": signal * eps - spread * clean, "x0": clean}
        noisy = signal * clean + spread * eps
        return Noised(noisy, time.float(), targets[self.prediction], torch.ones_like(level))

    def denoise(
        self, network: Network, condition: Tensor, eps: Tensor, steps: int | None = None
    ) -> Tensor:
        """Deterministic DDIM, 50 steps from t = `start` to 0."""
        x = eps
        times = torch.linspace(self.start, 0, steps or 50, device=eps.device).round().long()
        for place, now in enumerate(times):
            signal, spread = self._scales(now.expand(len(x)), x)
            answer = network(x, now.expand(len(x)).float(), condition).float()
            clean, error = self._split(answer, x, signal, spread)
            if place + 1 == len(times):
                return clean
            signal, spread = self._scales(times[place + 1].expand(len(x)), x)
            x = signal * clean + spread * error
        return x

    def _split(
        self, answer: Tensor, x: Tensor, signal: Tensor, spread: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return z0 and eps for a prediction at x."""
        if self.prediction == "eps":
            return (x - spread * answer) / signal, answer
        if self.prediction == "v":
            return signal * x - spread * answer, signal * answer + spread * x
        return answer, (x - signal * answer) / spread

    def _scales(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar) and sqrt(1 - abar) at t [N], shaped to multiply [N, V, d]."""
        kept = cosine_schedule(self.num_times).to(like.device)[time]
        return spread_over(kept.sqrt().float(), like), spread_over((1 - kept).sqrt().float(), like)


@dataclass(frozen=True)
class Preconditioning:
    """EDM's coefficients (its Table 1): D(x) = c_skip x + c_out F(c_in x, c_noise)."""

    skip: Tensor
    out: Tensor
    into: Tensor
    noise: Tensor
    weight: Tensor  # lambda: 1 / c_out^2


@dataclass(frozen=True)
class EDM(Denoising):
    """Karras et al. (2206.00364). Published is P_mean = -1.2 for sigma_data 0.5; for unit variance
    both shift by ln 2."""

    p_mean: float = -0.5
    """Mean of ln sigma in training."""
    p_std: float = 1.2
    """Standard deviation of ln sigma in training."""
    sigma_data: float = 1.0
    """Standard deviation of the data."""
    sigma_min: float = 0.002
    """Smallest noise level of the sampler."""
    sigma_max: float = 80.0
    """Largest noise level of the sampler."""
    rho: float = 7.0
    """Curvature of the sampler's schedule."""

    def preconditioning(self, sigma: Tensor) -> Preconditioning:
        """Return the five coefficients at sigma, in its shape."""
        total = (sigma.square() + self.sigma_data**2).sqrt()
        return Preconditioning(
            skip=(self.sigma_data / total).square(),
            out=sigma * self.sigma_data / total,
            into=1 / total,
            noise=sigma.log() / 4,
            weight=(total / (sigma * self.sigma_data)).square(),
        )

    def noise(self, clean: Tensor, level: Tensor, eps: Tensor) -> Noised:
        """As F's loss: lambda ||D - z0||^2 = lambda c_out^2 ||F - (z0 - c_skip x) / c_out||^2."""
        sigma = (self.p_mean + self.p_std * standard_normal(level)).exp()
        scales = self.preconditioning(spread_over(sigma, clean))
        x = clean + spread_over(sigma, clean) * eps
        target = (clean - scales.skip * x) / scales.out
        weight = (scales.weight * scales.out.square()).flatten()
        return Noised(scales.into * x, scales.noise.flatten() * TIME_SCALE, target, weight)

    def denoise(
        self, network: Network, condition: Tensor, eps: Tensor, steps: int | None = None
    ) -> Tensor:
        """Sample by Heun's second-order method, 18 steps, without churn."""
        ramp = torch.linspace(0, 1, steps or 18, device=eps.device)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigmas = torch.cat([(high + ramp * (low - high)) ** self.rho, torch.zeros_like(ramp[:1])])

        def slope(x: Tensor, sigma: Tensor) -> Tensor:
            scales = self.preconditioning(sigma)
            time = scales.noise.expand(len(x)) * TIME_SCALE
            answer = network(scales.into * x, time, condition).float()
            return (x - scales.skip * x - scales.out * answer) / sigma

        x = sigmas[0] * eps
        for now, following in pairwise(sigmas):
            first = slope(x, now)
            ahead = x + (following - now) * first
            if following > 0:
                ahead = x + (following - now) * (first + slope(ahead, following)) / 2
            x = ahead
        return x


@dataclass(frozen=True)
class Regression(Denoising):
    """Plain regression, a control that separates the effect of *diffusion* from *visual* targets.

    The network gets zeros at time 0, so it can only predict E[z0 | condition].
    """

    def noise(self, clean: Tensor, level: Tensor, eps: Tensor) -> Noised:
        """Return an input without the clean vector, which is the target."""
        return Noised(
            torch.zeros_like(clean), torch.zeros_like(level), clean, torch.ones_like(level)
        )

    def denoise(
        self, network: Network, condition: Tensor, eps: Tensor, steps: int | None = None
    ) -> Tensor:
        """Predict in one call; `eps` and `steps` have no effect."""
        return network(torch.zeros_like(eps), eps.new_zeros(len(eps)), condition).float()


DENOISINGS: dict[str, Denoising] = {
    "fm": FlowMatching(),
    "ddpm_eps": DDPM("eps"),
    "ddpm_v": DDPM("v"),
    "ddpm_x0": DDPM("x0"),
    "edm": EDM(),
    "mse": Regression(),
}
"""Each variant with the method's defaults."""


def denoising(kind: str, times: Times = "uniform", shift: float = 0.0) -> Denoising:
    """Return the variant with this name; only flow matching uses `times` and `shift`."""
    return FlowMatching(shift, times) if kind == "fm" else DENOISINGS[kind]


@cache
def cosine_schedule(num_times: int) -> Tensor:
    """Return abar [num_times] float64 for the cosine schedule, with each beta at most 0.999.

    abar_t = f(t) / f(0), f(t) = cos^2((t / T + .008) / 1.008 * pi / 2) (2102.09672, eq. 17).
    """
    places = torch.arange(num_times + 1, dtype=torch.float64) / num_times
    curve = ((places + 0.008) / 1.008 * math.pi / 2).cos().square()
    betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return (1 - betas).cumprod(0)

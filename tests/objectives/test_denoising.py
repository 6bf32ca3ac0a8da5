"""Diffusions against closed forms and published constants: one oracle test for all of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from karma_ray.objectives.denoising import (
    DDPM,
    DENOISINGS,
    EDM,
    FlowMatching,
    Regression,
    cosine_schedule,
)
from karma_ray.objectives.diffusion import TIME_SCALE, Denoising

VARIANTS: dict[str, Denoising] = {
    **DENOISINGS,
    "fm_shifted": FlowMatching(shift=2.5),
    "fm_logit_normal": FlowMatching(times="logit_normal"),
    "edm_images": EDM(p_mean=-1.2, sigma_data=0.5),
}


def _point(rows: int = 1) -> Tensor:
    point = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(7))
    return point.expand(rows, -1, -1)


def _draws(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    level = (torch.arange(rows) + 0.5) / rows
    return level, torch.randn(rows, 3, 5, generator=generator)


class Oracle:
    """What the optimal network answers when the data are the one `point`.

    It knows the method's equations, solved for the noise from what it sees; no code of ours.
    """

    def __init__(self, variant: Denoising, point: Tensor) -> None:
        self.variant, self.point = variant, point

    def __call__(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        t, x = time[:, None, None].double(), noisy.double()
        z0 = self.point.double().expand_as(x)
        if isinstance(self.variant, FlowMatching):
            return ((x - z0) / (t / TIME_SCALE)).float()
        if isinstance(self.variant, DDPM):
            abar = torch.tensor([_abar(int(step)) for step in time])[:, None, None]
            eps = (x - abar.sqrt() * z0) / (1 - abar).sqrt()
            velocity = abar.sqrt() * eps - (1 - abar).sqrt() * z0
            return {"eps": eps, "v": velocity, "x0": z0}[self.variant.prediction].float()
        if isinstance(self.variant, EDM):
            sigma, data = (4 * t / TIME_SCALE).exp(), self.variant.sigma_data
            total = (sigma**2 + data**2).sqrt()
            answer = (z0 - data**2 / total**2 * (x * total)) * total / (sigma * data)
            return answer.float()
        return z0.float()


def _abar(step: int, total: int = 1000) -> float:
    kept = 1.0
    for t in range(step + 1):
        after, before = (
            math.cos(((place / total) + 0.008) / 1.008 * math.pi / 2) ** 2 for place in (t + 1, t)
        )
        kept *= 1 - min(1 - after / before, 0.999)
    return kept


@pytest.mark.parametrize("name", VARIANTS)
def test_with_one_data_point_the_optimal_denoiser_is_the_target_and_samples_are_the_point(
    name: str,
) -> None:
    variant, condition = VARIANTS[name], torch.zeros(16, 3, 2)
    oracle = Oracle(variant, _point())
    level, eps = _draws(16)

    noised = variant.noise(_point(16), level, eps)
    answer = oracle(noised.noisy, noised.time, condition)
    torch.testing.assert_close(answer, noised.target, atol=3e-3, rtol=1e-3)
    assert variant.loss(oracle, _point(16), condition, level, eps).max() < 1e-5

    sample = variant.sample(
        oracle, condition, (16, 3, 5), generator=torch.Generator().manual_seed(3)
    )
    torch.testing.assert_close(sample, _point(16), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_number_of_steps_is_free(name: str, steps: int) -> None:
    oracle, calls = Oracle(VARIANTS[name], _point()), []

    def counted(noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        calls.append(float(time[0]))
        return oracle(noisy, time, condition)

    sample = VARIANTS[name].denoise(counted, torch.zeros(2, 3, 2), torch.randn(2, 3, 5), steps)
    torch.testing.assert_close(sample, _point(2), atol=2e-3, rtol=1e-3)
    assert len(calls) == {"mse": 1}.get(name, 2 * steps - 1 if "edm" in name else steps)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_is_a_mean_and_about_one_for_a_network_that_says_nothing(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    level = torch.rand(2000, generator=generator)

    def silent(noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return torch.zeros_like(noisy)

    for shape in ((2000, 1, 8), (2000, 4, 16)):
        clean, eps = (torch.randn(shape, generator=generator) for _ in range(2))
        if name == "edm_images":
            clean = clean * 0.5
        loss = VARIANTS[name].loss(silent, clean, torch.zeros(2000, shape[1], 1), level, eps)
        assert loss.shape == (2000,)
        expected = 2.0 if "fm" in name else 1.0  # eps - z0 has variance 2
        assert loss.mean().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_infinite_at_the_ends_of_the_draws(name: str) -> None:
    level = torch.tensor([0.0, 1 - 2**-24, 1.0])
    noised = VARIANTS[name].noise(_point(3), level, torch.randn(3, 3, 5))
    for field in (noised.noisy, noised.time, noised.target, noised.weight):
        assert field.isfinite().all()


def test_the_cosine_schedule_has_the_golden_values_of_the_method() -> None:
    kept = cosine_schedule(1000)
    found = [float(kept[t - 1]) for t in (250, 500, 750)]
    assert found == pytest.approx([0.8470, 0.4938, 0.1443], abs=5e-5)
    assert float(kept[-1]) == pytest.approx(2.4e-9, rel=0.02)


def test_ddim_starts_at_980_so_that_a_small_error_does_not_widen_its_samples() -> None:
    def off(noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """The optimal eps for N(0, 1) data is x sqrt(1 - abar); ours is 1 % too small."""
        kept = cosine_schedule(1000)[time.long()].float()[:, None, None]
        return 0.99 * noisy * (1 - kept).sqrt()

    condition, eps = torch.zeros(400, 1, 1), torch.randn(400, 1, 8)
    assert DDPM().denoise(off, condition, eps).std() < 1.6
    assert DDPM(start=999).denoise(off, condition, eps).std() > 4


def test_time_is_shifted_as_in_rae() -> None:
    flow = FlowMatching()
    half = torch.tensor([0.5])
    assert flow.shifted(half, (16, 1152)).item() == pytest.approx(0.680, abs=5e-4)
    a = math.sqrt(16 * 1152 / 4096)
    assert a == pytest.approx(2.121, abs=5e-4)
    assert flow.shifted(half, (16, 1152)).item() == pytest.approx(a * 0.5 / (1 + (a - 1) * 0.5))
    assert flow.shifted(half, (1, 128)).item() == 0.5  # never below a = 1
    torch.testing.assert_close(flow.shifted(torch.tensor([0.0, 1.0]), (16, 1152)),
                               torch.tensor([0.0, 1.0]))  # fmt: skip


def test_edm_has_its_published_coefficients() -> None:
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0], dtype=torch.float64)
    scales = EDM().preconditioning(sigma)
    assert scales.skip[2].item() == pytest.approx(0.5)
    assert scales.out[2].item() == pytest.approx(0.7071, abs=5e-5)
    torch.testing.assert_close(scales.weight * scales.out.square(), torch.ones_like(sigma))
    torch.testing.assert_close(scales.noise, sigma.log() / 4)
    torch.testing.assert_close(scales.into, 1 / (1 + sigma**2).sqrt())


def test_edm_noise_levels_are_log_normal_around_p_mean() -> None:
    level = (torch.arange(4000) + 0.5) / 4000
    noised = EDM().noise(torch.zeros(4000, 1, 1), level, torch.zeros(4000, 1, 1))
    log_sigma = 4 * noised.time / TIME_SCALE
    assert log_sigma.mean().item() == pytest.approx(-0.5, abs=1e-3)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.01)


def test_one_step_of_edm_or_flow_matching_is_the_mean_and_many_are_a_mode() -> None:
    """Sampler steps go from mean-seeking to mode-seeking (method 1.12). Data: -1 or 1."""

    def posterior_mean(x: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return torch.tanh(x * signal / spread.square())

    def flow(noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        t = (time / TIME_SCALE)[:, None, None]
        return (noisy - posterior_mean(noisy, 1 - t, t)) / t

    def edm(noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        sigma = (4 * time / TIME_SCALE).exp()[:, None, None]
        scales = EDM().preconditioning(sigma)
        x = noisy / scales.into
        return (posterior_mean(x, torch.ones_like(x), sigma) - scales.skip * x) / scales.out

    eps = torch.randn(300, 1, 1, generator=torch.Generator().manual_seed(0))
    condition = torch.zeros(300, 1, 1)
    for variant, network in ((FlowMatching(), flow), (EDM(), edm)):
        assert variant.denoise(network, condition, eps, 1).abs().max() < 0.1
        many = variant.denoise(network, condition, eps, 40)
        assert (many.abs() - 1).abs().median() < 0.05
        assert many.mean().abs() < 0.15


def test_regression_never_sees_the_clean_vector() -> None:
    level, eps = _draws(16)
    noised = Regression().noise(_point(16), level, eps)
    assert not noised.noisy.any() and not noised.time.any()

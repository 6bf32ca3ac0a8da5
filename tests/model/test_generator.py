"""The generator against closed forms: what its samplers draw, what it serves, what learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from karma_ray.errors import InputError
from karma_ray.model.config import GeneratorConfig
from karma_ray.model.denoiser import DenoiserConfig
from karma_ray.model.generator import Generator
from karma_ray.objectives.denoising import DENOISINGS, EDM, FlowMatching, cosine_schedule
from karma_ray.objectives.diffusion import TIME_SCALE
from tests import tiny

WIDTH, SPREAD = 16, 0.4
DIFFUSIONS = ["fm", "edm", "ddpm_eps", "ddpm_v", "ddpm_x0"]


def generator(kind: str = "fm", **fields: Any) -> Generator:
    torch.manual_seed(1)
    made = Generator(GeneratorConfig(kind=kind, **fields), WIDTH)  # type: ignore[arg-type]
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return made.eval()


class Exact(nn.Module):
    """The best possible answer where z given the condition is N(condition, SPREAD^2)."""

    def __init__(self, kind: str, off: float = 1.0) -> None:
        super().__init__()
        self.kind, self.off = kind, off

    def forward(self, noisy: Tensor, time: Tensor, mean: Tensor) -> Tensor:
        variance = SPREAD**2
        if self.kind == "fm":
            t = (time / TIME_SCALE).view(-1, 1, 1)
            signal, noise = 1 - t, t
        elif self.kind == "edm":
            sigma = (4 * time / TIME_SCALE).exp().view(-1, 1, 1)
            scales = EDM().preconditioning(sigma)
            x = noisy / scales.into
            clean = (variance * x + sigma**2 * mean) / (variance + sigma**2)
            return (clean - scales.skip * x) / scales.out
        else:
            kept = cosine_schedule(1000)[time.long()].float().view(-1, 1, 1)
            signal, noise = kept.sqrt(), (1 - kept).sqrt()
        total = signal**2 * variance + noise**2
        clean = mean + signal * variance / total * (noisy - signal * mean)
        eps = noise / total * (noisy - signal * mean)
        return {
            "fm": eps - clean, "ddpm_eps": self.off * eps, "ddpm_v": signal * eps - noise * clean,
            "ddpm_x0": clean,
        }[self.kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["fm", "edm"])
def test_one_step_from_pure_noise_is_the_conditional_mean(kind: str) -> None:
    made, mean = generator(kind, samples=64, agg="union", steps=1), torch.randn(3, WIDTH)
    made.head = Exact(kind)
    drawn = torch.stack([made._drawn(mean, noise, 1) for noise in torch.randn(64, 3, WIDTH)])
    torch.testing.assert_close(drawn, mean.expand_as(drawn), atol=0.02, rtol=0)
    torch.testing.assert_close(
        made.estimate(mean), torch.nn.functional.rms_norm(mean, (WIDTH,)), atol=0.03, rtol=0.01
    )


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_the_deviation_tells_how_wide_samples_are(kind: str) -> None:
    made, alike = generator(kind), torch.zeros(400, WIDTH)  # only chance tells these requests apart
    made.head = Exact(kind)
    assert made.deviation(alike, np.arange(400)) == pytest.approx(SPREAD, rel=0.08)
    assert generator("mse").deviation(alike) == 0.0


def test_an_error_on_eps_makes_samples_much_too_wide() -> None:
    """Why the deviation is told: DDPM by noise divides the error by a signal of .03 at first."""
    made, alike = generator("ddpm_eps"), torch.zeros(400, WIDTH)
    made.head = Exact("ddpm_eps", off=0.85)
    assert made.deviation(alike, np.arange(400)) > 1.5 * SPREAD


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_many_steps_draw_from_the_conditional_distribution(kind: str) -> None:
    made, mean = generator(kind, samples=256, agg="union"), torch.randn(3, WIDTH)
    made.head = Exact(kind)
    drawn = torch.stack([made._drawn(mean, noise, None) for noise in torch.randn(256, 3, WIDTH)])
    assert (drawn.mean(0) - mean).abs().max() < 4 * SPREAD / 16
    assert drawn.std(0).mean().item() == pytest.approx(SPREAD, rel=0.08)


def test_the_mean_of_samples_comes_nearer_than_one() -> None:
    mean = torch.randn(200, WIDTH)
    wanted = torch.nn.functional.rms_norm(mean, (WIDTH,))
    errors = []
    for samples, agg in ((1, "single"), (4, "mean"), (64, "mean")):
        made = generator("fm", samples=samples, agg=agg)
        made.head = Exact("fm")
        found = made.search_with(mean, np.arange(200))[:, 0]
        errors.append((found - wanted).square().mean().sqrt().item())
    assert errors[0] > 1.5 * errors[1] and errors[1] > 1.5 * errors[2]


def test_a_sample_is_a_mode_where_regression_is_their_mean() -> None:
    mode, told = torch.randn(WIDTH), torch.ones(64, WIDTH)
    found = {}
    for kind in ("mse", "fm"):
        made = generator(kind, denoiser=DenoiserConfig(num_layers=1), samples=1)
        optimizer = torch.optim.Adam(made.parameters(), 3e-3)
        for step in range(250):
            signs = torch.from_numpy(np.where(np.arange(64) % 2, 1.0, -1.0)).float()
            keys = np.arange(64) + 64 * step
            loss = made.losses(told, signs[:, None] * mode, keys).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[kind] = made._drawn(told[:1], made.origin, None)[0].detach()
    assert found["mse"].norm() < 0.2 * mode.norm()
    assert torch.cosine_similarity(found["fm"], mode, dim=0).abs() > 0.9
    assert 0.6 < found["fm"].norm() / mode.norm() < 1.4


@pytest.mark.parametrize("kind", ["mse", *DIFFUSIONS])
def test_a_request_is_answered_alike_in_any_company(kind: str) -> None:
    made, interest = generator(kind, samples=3, agg="union", steps=4), torch.randn(5, WIDTH)
    keys = np.array([8, -3, 5, 2**40, 1])
    together = made.search_with(interest, keys)
    assert together.shape == (5, 3, WIDTH)
    alone = [made.search_with(interest[n : n + 1], keys[n : n + 1]) for n in range(5)]
    torch.testing.assert_close(together, torch.cat(alone))
    torch.testing.assert_close(together, made.search_with(interest, keys))
    torch.testing.assert_close(together.square().mean(-1), torch.ones(5, 3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["mse", *DIFFUSIONS])
def test_requests_share_no_draw(kind: str) -> None:
    """The same h under 40 keys: regression gives one answer, a diffusion 40 independent ones."""
    made = generator(kind, samples=2, agg="union", steps=4)
    found = made.search_with(torch.ones(1, WIDTH).expand(40, -1), np.arange(40)).flatten(0, 1)
    distinct = len(found.unique(dim=0))
    assert distinct == (1 if kind == "mse" else 80)
    assert made.is_random == (kind != "mse")
    if made.is_random:
        with pytest.raises(ValueError, match="keys of the requests"):
            made.search_with(torch.ones(1, WIDTH))


@pytest.mark.parametrize("kind", ["mse", *DIFFUSIONS])
def test_the_target_gets_no_gradient_and_the_condition_does(kind: str) -> None:
    made = generator(kind)
    interest, target = torch.randn(4, WIDTH).requires_grad_(), torch.randn(4, WIDTH)
    target.requires_grad_()
    values = made.losses(interest, target, np.arange(4))
    assert values.shape == (4,)
    values.sum().backward()
    assert target.grad is None
    assert interest.grad is not None and bool(interest.grad.abs().sum(1).gt(0).all())


def test_a_row_draws_the_same_in_any_company() -> None:
    made, interest, target = generator(), torch.randn(6, WIDTH), torch.randn(6, WIDTH)
    keys = np.array([9, 4, 7, 1, 3, 8])
    whole = made.losses(interest, target, keys)
    some = made.losses(interest[[4, 1]], target[[4, 1]], keys[[4, 1]])
    torch.testing.assert_close(whole[[4, 1]], some)


def test_statistics_are_those_of_the_items_seen() -> None:
    made = generator()
    items = torch.randn(500, WIDTH) * torch.linspace(0.5, 3, WIDTH) + 2
    for part in items.split(100):
        made.observe(part)
    torch.testing.assert_close(made.mean, items.mean(0))
    scaled = made._standardised(items)
    assert scaled.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(scaled.square().mean(0), torch.ones(WIDTH), atol=1e-3, rtol=0)
    for _ in range(600):
        made.observe(items[:100] + 5)
    torch.testing.assert_close(made.mean, items[:100].mean(0) + 5, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("fields", "name", "words"),
    [
        ({"samples": 0}, "model.generator.samples", "should be greater than or equal to 1"),
        ({"steps": -1}, "model.generator.steps", "should be greater than or equal to 0"),
        ({"draws": 0}, "model.generator.draws", "should be greater than or equal to 1"),
        ({"samples": 4}, "model.generator.agg", "mean, union"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    fields: dict[str, int], name: str, words: str
) -> None:
    with pytest.raises(InputError, match=words) as refused:
        generator("fm", **fields)
    assert name in str(refused.value)


def test_times_and_shift_reach_the_head_of_flow_matching() -> None:
    denoiser = DenoiserConfig(times="logit_normal", shift=3.0)
    made = Generator(GeneratorConfig(kind="fm", denoiser=denoiser), WIDTH)
    assert made.denoising == FlowMatching(shift=3.0, times="logit_normal")
    with pytest.raises(InputError, match=r"generator\.denoiser\.times: 'logit_normal' .*'edm'"):
        GeneratorConfig(kind="edm", denoiser=denoiser).check()
    with pytest.raises(InputError, match=r"model\.generator\.denoiser\.shift: -2"):
        GeneratorConfig(kind="fm", denoiser=DenoiserConfig(shift=-2)).check()


def test_every_variant_is_a_denoising() -> None:
    assert {"mse", *DIFFUSIONS} == set(DENOISINGS)


def test_a_model_without_generator_searches_with_h() -> None:
    interest = tiny.model().interest
    before = torch.get_rng_state()
    names = set(interest.state_dict())
    interest.generate_with(GeneratorConfig(kind="fm"), 0)
    added = set(interest.state_dict()) - names
    assert added and all(name.startswith("generator.") for name in added)
    interest.generate_with(GeneratorConfig(), 0)
    assert set(interest.state_dict()) == names and torch.equal(before, torch.get_rng_state())
    rows = torch.randn(2, interest.width)
    torch.testing.assert_close(interest.search_vectors(rows)[:, 0], interest.query_vectors(rows))
    assert interest.decodable(rows) is rows


def test_a_predicted_noise_is_no_estimate_in_one_step() -> None:
    """At t = 980 its error is multiplied by 1 / sqrt(abar), about 34."""
    GeneratorConfig(kind="ddpm_v", recon_src="x0").check()
    with pytest.raises(
        InputError, match=r"recon_src: 'x0' .*ddpm_v or ddpm_x0; choices: condition"
    ):
        GeneratorConfig(kind="ddpm_eps", recon_src="x0").check()

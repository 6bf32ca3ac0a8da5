"""The head's network: silent at first, token by token, told by time and condition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from karma_ray.model.denoiser import Denoiser, DenoiserConfig, time_features


def _inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noisy, condition = (torch.randn(4, 3, n, generator=generator) for n in (6, 10))
    return noisy, 1000 * torch.rand(4, generator=generator), condition


def _talkative(**changes: int) -> Denoiser:
    network = Denoiser(6, 10, DenoiserConfig(**changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return network


def test_at_first_it_says_nothing_and_its_blocks_are_the_identity() -> None:
    network = Denoiser(6, 10, DenoiserConfig())
    noisy, time, condition = _inputs()
    assert not network(noisy, time, condition).any()
    hidden = network.into(noisy)
    for block in network.blocks:
        assert torch.equal(block(hidden, torch.randn(4, 3, 10)), hidden)


def test_for_regression_only_the_modulations_start_at_zero() -> None:
    noisy, time, condition = _inputs()
    network = Denoiser(6, 10, DenoiserConfig(), sees_noise=False)
    network(torch.zeros_like(noisy), time, condition).square().sum().backward()
    assert network.modulation.weight.grad.abs().sum() > 0
    assert not network.modulation.weight.any() and network.output.weight.any()


@pytest.mark.parametrize(("width", "found"), [({}, 10), ({"width": 7}, 7), ({"num_layers": 1}, 10)])
def test_it_is_as_wide_as_token_and_condition_unless_told(
    width: dict[str, int], found: int
) -> None:
    network = Denoiser(6, 10, DenoiserConfig(**width))
    assert network.output.in_features == found
    assert len(network.blocks) == width.get("num_layers", 3)
    assert Denoiser(12, 10, DenoiserConfig()).output.in_features == 12


def test_a_token_is_answered_from_itself_its_condition_and_its_examples_time() -> None:
    network = _talkative()
    noisy, time, condition = (value.requires_grad_() for value in _inputs())
    answer = network(noisy, time, condition)
    gradients = torch.autograd.grad(answer[1, 2].pow(3).sum(), (noisy, time, condition))
    of_noisy, of_time, of_condition = (value.abs() for value in gradients)
    assert of_noisy.sum(-1).nonzero().tolist() == [[1, 2]]
    assert of_condition.sum(-1).nonzero().tolist() == [[1, 2]]
    assert of_time.nonzero().flatten().tolist() == [1]


def test_neighbouring_times_have_near_and_distant_ones_far_features() -> None:
    features = time_features(torch.tensor([500.0, 500.5, 700.0, -800.0]))
    assert features.shape == (4, 256)
    near, far, below = ((features[0] - other).norm() for other in features[1:])
    assert near < 0.2 * min(far, below)

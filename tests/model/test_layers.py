"""Our norm and attention are Qwen3's, with the same weights, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from karma_ray.model.backbone import build_tiny, run_body, stock_body
from karma_ray.model.config import TinyBackboneConfig
from karma_ray.model.layers import RMSNorm

TINY = TinyBackboneConfig(hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64)


def test_the_norms_gradients_are_those_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = nn.Parameter(torch.rand(8, generator=generator, dtype=torch.float64))
    norm = RMSNorm(weight, 1e-6)
    assert torch.autograd.gradcheck(lambda value, _: norm(value), (x, weight))


def test_a_strided_gradient_is_as_good_as_any() -> None:
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(nn.Parameter(torch.ones(8, dtype=torch.float64)), 1e-6)
    assert torch.autograd.gradcheck(lambda value: norm(value).transpose(1, 2), (x,))


def test_under_autocast_the_norm_gives_the_compute_type() -> None:
    norm = RMSNorm(nn.Parameter(torch.ones(8)), 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(torch.randn(2, 8)).dtype == torch.bfloat16
    assert norm(torch.randn(2, 8)).dtype == torch.float32


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_body_is_the_stock_body_with_the_same_weights(attention: str) -> None:
    body = build_tiny(TINY, 300, seed=0)
    stock = stock_body(body, attention)
    assert all(a is b for a, b in zip(body.parameters(), stock.parameters(), strict=True))
    soft = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1))
    gradients = []
    for states in (run_body(body, soft), stock(inputs_embeds=soft).last_hidden_state):
        body.zero_grad()
        states.square().sum().backward()
        found = [p.grad.flatten() for p in body.parameters() if p.grad is not None]
        gradients.append((states.detach(), torch.cat(found)))
    (ours, our_gradient), (theirs, their_gradient) = gradients
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_gradient, their_gradient, atol=1e-3, rtol=1e-4)


def test_a_saved_body_is_a_plain_qwen3_checkpoint() -> None:
    body = build_tiny(TINY, 300, seed=0)
    assert set(body.state_dict()) == set(stock_body(body).state_dict())

"""Token cross-entropy: chunks change nothing, masked targets do not exist."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from karma_ray.objectives.text import reduce_tokens, token_cross_entropy


def _case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(5, 7, 8, generator=generator, dtype=torch.float64)
    head = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (5, 7), generator=generator)
    mask = torch.rand(5, 7, generator=generator) < 0.7
    return states.requires_grad_(), head.requires_grad_(), labels, mask


def _plain(states: Tensor, head: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    values = functional.cross_entropy(
        (states @ head.T).flatten(0, 1), labels.flatten(), reduction="none"
    )
    return values.view(labels.shape) * mask


@pytest.mark.parametrize("chunk", [1, 4, 2048])
def test_chunks_change_neither_values_nor_gradients(chunk: int) -> None:
    states, head, labels, mask = _case()
    expected = _plain(states, head, labels, mask)
    found = token_cross_entropy(states, head, labels, mask, chunk)
    torch.testing.assert_close(found, expected.float())
    weights = torch.arange(35.0).view(5, 7)
    wanted = torch.autograd.grad((expected * weights).sum(), (states, head))
    got = torch.autograd.grad((found * weights).sum(), (states, head))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_masked_target_has_no_value_and_no_gradient() -> None:
    states, head, labels, mask = _case()
    values = token_cross_entropy(states, head, labels, mask)
    assert (values[~mask] == 0).all() and (values[mask] > 0).all()
    (gradient,) = torch.autograd.grad(values.sum(), states)
    assert (gradient[~mask] == 0).all()
    other = labels.masked_fill(~mask, 0)
    assert torch.equal(token_cross_entropy(states, head, other, mask), values)


def test_no_targets_cost_nothing() -> None:
    states, head, labels, mask = _case()
    values = token_cross_entropy(states, head, labels, torch.zeros_like(mask))
    assert values.tolist() == torch.zeros(5, 7).tolist()


def test_equal_logits_cost_the_log_of_the_vocabulary() -> None:
    states, head, labels, mask = _case()
    values = token_cross_entropy(torch.zeros_like(states), head, labels, mask)
    torch.testing.assert_close(values[mask], torch.full_like(values[mask], 11).log())


def test_token_mean_is_each_examples_own_mean_and_sum_its_sum() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False] * 3])
    assert reduce_tokens(values, mask, "token_mean").tolist() == [2.0, 4.0, 0.0]
    assert reduce_tokens(values, mask, "sum").tolist() == [6.0, 4.0, 0.0]

"""L_act's published values and identities."""

from __future__ import annotations

import pytest
import torch

from karma_ray.objectives.action import (
    ACTION_LOSSES,
    BinaryCrossEntropy,
    InfoNCE,
    MeanSquaredError,
    Pairwise,
    pair_weights,
)

POSITIVE = torch.tensor([2.0])
NEGATIVES = torch.tensor([[1.0, 0.0]])


def _scores(rows: int, negatives: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, generator=generator, dtype=torch.float64),
        torch.randn(rows, negatives, generator=generator, dtype=torch.float64),
    )


def _some(rows: int, negatives: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(rows, negatives, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize(
    ("reduction", "value"), [("paper_sum", 0.440190), ("mean_by_type", 0.220095)]
)
def test_the_pairwise_loss_has_the_golden_values_of_the_method(
    reduction: str, value: float
) -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    weights = pair_weights(mask, mask[:, :0], reduction, 1.0, 1.0)
    assert Pairwise()(POSITIVE, NEGATIVES, weights).item() == pytest.approx(value, abs=1e-6)


def test_infonce_with_one_negative_and_temperature_one_is_pairwise() -> None:
    positive, negatives = _scores(20, 1)
    weights = torch.ones_like(negatives)
    torch.testing.assert_close(
        InfoNCE(temperature=1.0)(positive, negatives, weights),
        Pairwise()(positive, negatives, weights),
    )


def test_infonce_is_cross_entropy_against_the_counted_negatives() -> None:
    positive, negatives = _scores(6, 5)
    mask = _some(6, 5)
    found = InfoNCE(temperature=0.5)(positive, negatives, mask.double())
    for row in range(6):
        logits = torch.cat([positive[row : row + 1], negatives[row][mask[row]]]) / 0.5
        torch.testing.assert_close(found[row], -logits.log_softmax(0)[0])


@pytest.mark.parametrize("name", ACTION_LOSSES)
def test_a_masked_pair_has_no_value_and_no_gradient(name: str) -> None:
    positive, negatives = _scores(4, 6)
    mask = _some(4, 6)
    negatives.requires_grad_()
    value = ACTION_LOSSES[name](positive, negatives, mask.double())
    (gradient,) = torch.autograd.grad(value.sum(), negatives)
    assert (gradient[~mask] == 0).all() and (gradient[mask] > 0).all()
    changed = negatives.detach().masked_fill(~mask, 50.0)
    assert torch.equal(ACTION_LOSSES[name](positive, changed, mask.double()), value.detach())


@pytest.mark.parametrize("loss", [Pairwise(), InfoNCE()])
def test_a_row_without_negatives_contributes_nothing(loss: Pairwise | InfoNCE) -> None:
    positive, negatives = _scores(3, 4)
    positive.requires_grad_()
    none = torch.zeros(3, 2, dtype=torch.bool)
    weights = pair_weights(none, none, "mean_by_type", 1.0, 1.0).double()
    value = loss(positive, negatives, weights)
    assert value.tolist() == [0.0] * 3
    (gradient,) = torch.autograd.grad(value.sum(), positive)
    assert gradient.tolist() == [0.0] * 3


@pytest.mark.parametrize("loss", [BinaryCrossEntropy(), MeanSquaredError()])
def test_pointwise_losses_still_learn_the_click_of_a_row_without_negatives(
    loss: BinaryCrossEntropy | MeanSquaredError,
) -> None:
    positive, negatives = _scores(3, 0)
    lower = loss(positive, negatives, negatives)
    assert (lower > loss(positive + 1, negatives, negatives)).all()


@pytest.mark.parametrize("name", ACTION_LOSSES)
def test_every_loss_falls_with_the_positive_and_rises_with_a_negative(name: str) -> None:
    positive, negatives = _scores(8, 3)
    weights = torch.ones_like(negatives)
    loss = ACTION_LOSSES[name]
    value = loss(positive, negatives, weights)
    assert value.shape == (8,)
    assert (loss(positive + 0.1, negatives, weights) < value).all()
    assert (loss(positive, negatives + 0.1, weights) > value).all()


def test_the_pairwise_loss_is_finite_at_extreme_scores() -> None:
    value = Pairwise()(torch.tensor([-1e4]), torch.tensor([[1e4]]), torch.ones(1, 1))
    assert value.item() == pytest.approx(2e4)


def test_mean_by_type_takes_each_types_mean_without_masked_pairs() -> None:
    hard = torch.tensor([[True, False], [True, True], [False, False]])
    in_batch = torch.tensor([[True, True, True, False], [True, False, False, False], [True] * 4])
    weights = pair_weights(hard, in_batch, "mean_by_type", 0.5, 2.0)
    expected = [
        [0.5, 0, 2 / 3, 2 / 3, 2 / 3, 0],
        [0.25, 0.25, 2, 0, 0, 0],
        [0, 0, 0.5, 0.5, 0.5, 0.5],
    ]
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_paper_sum_counts_every_pair_once() -> None:
    hard, in_batch = _some(5, 3), _some(5, 7)
    weights = pair_weights(hard, in_batch, "paper_sum", 1.0, 1.0)
    assert torch.equal(weights, torch.cat([hard, in_batch], 1).float())


def test_mean_by_type_does_not_grow_with_the_number_of_negatives() -> None:
    few, many = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 200, dtype=torch.bool)
    for mask in (few, many):
        assert pair_weights(mask, mask, "mean_by_type", 1.0, 1.0).sum().item() == pytest.approx(2)
        assert pair_weights(mask, mask, "paper_sum", 1.0, 1.0).sum() == 2 * mask.shape[1]

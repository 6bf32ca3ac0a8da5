"""Two gloo processes against one process on the concatenated batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from karma_ray.training import parallel
from tests.gloo import run_workers

ROWS = (3, 5)
FEATURES = 4


def _batch() -> Tensor:
    return torch.randn(sum(ROWS), FEATURES, generator=torch.Generator().manual_seed(1))


def _model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, FEATURES)


def _contrastive_loss(model: nn.Module, rows: Tensor, shift: int = 0) -> Tensor:
    """In-batch InfoNCE: this worker's sum over the global count; `shift` plants a wrong order."""
    counts = parallel.row_counts(rows.shape[0])
    encoded = model(rows)
    everyone = parallel.all_gather_rows(encoded, counts)
    scores = encoded @ everyone.T
    own = torch.arange(rows.shape[0]) + parallel.row_offset(counts)
    total = nn.functional.cross_entropy(scores, (own + shift) % sum(counts), reduction="sum")
    return total / sum(counts)


def _worker(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    rows = _batch().split(list(ROWS))[rank]
    for name, shift in (("loss", 0), ("wrong_loss", 1)):
        model = _model()
        loss = _contrastive_loss(model, rows, shift)
        loss.backward()
        parallel.sum_gradients(model.parameters())
        found[name] = parallel.global_sum(loss)
        found[f"{name}_gradient"] = model.weight.grad
    ids = torch.arange(2 + rank)[:, None] + 10 * rank
    found["ids"] = parallel.all_gather_ints(ids)
    partly = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    if rank == 0:
        partly[0].sum().mul(2).backward()
    partly[1].sum().backward()
    parallel.sum_gradients(partly)
    found["partial"], found["both"], found["none"] = [parameter.grad for parameter in partly]
    unequal = nn.Linear(2, 2)
    nn.init.constant_(unequal.weight, float(rank))
    parallel.broadcast_parameters(unequal)
    found["broadcast"] = unequal.weight.detach()
    return found


@pytest.fixture(scope="module")
def workers() -> list[dict[str, Any]]:
    """What both workers found."""
    return run_workers(_worker, 2)


def _alone(shift: int = 0) -> tuple[Tensor, Tensor]:
    model = _model()
    loss = _contrastive_loss(model, _batch(), shift)
    loss.backward()
    assert model.weight.grad is not None
    return loss.detach(), model.weight.grad


def test_two_workers_with_unequal_rows_equal_one_worker(workers: list[dict[str, Any]]) -> None:
    loss, gradient = _alone()
    for found in workers:
        torch.testing.assert_close(found["loss"], loss)
        torch.testing.assert_close(found["loss_gradient"], gradient)


def test_a_wrong_row_offset_would_be_noticed(workers: list[dict[str, Any]]) -> None:
    loss, _ = _alone()
    assert abs(float(workers[0]["wrong_loss"] - loss)) > 1e-2
    torch.testing.assert_close(workers[0]["wrong_loss"], _alone(shift=1)[0])


def test_integers_are_gathered_in_rank_order(workers: list[dict[str, Any]]) -> None:
    for found in workers:
        assert found["ids"].tolist() == [[0], [1], [10], [11], [12]]


def test_a_parameter_without_gradient_on_one_worker_takes_part_with_zeros(
    workers: list[dict[str, Any]],
) -> None:
    for found in workers:
        assert found["partial"].tolist() == [2.0, 2.0]
        assert found["both"].tolist() == [2.0, 2.0]
        assert found["none"] is None


def test_every_worker_starts_from_the_first_ones_weights(workers: list[dict[str, Any]]) -> None:
    assert all(not found["broadcast"].any() for found in workers)


def test_without_a_process_group_everything_is_the_identity() -> None:
    rows = _batch().requires_grad_()
    assert parallel.all_gather_rows(rows) is rows
    assert parallel.all_gather_ints(rows) is rows
    assert torch.equal(parallel.global_sum(rows), rows)
    assert (parallel.rank(), parallel.world_size(), parallel.row_counts(4)) == (0, 1, [4])

"""CTR models of every family: two workers' gradients are those of one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from karma_ray.ranking.batch import CtrBatch
from karma_ray.ranking.objective import CLICKS, Term
from karma_ray.ranking.ocarm import ocarm_terms
from karma_ray.training import parallel
from karma_ray.training.ctr_step import CtrStep
from tests.gloo import run_workers
from tests.ranking import test_ocarm, test_qarm, test_sarm

CASES = ("ocarm", "qarm", "sarm")


def case(name: str) -> tuple[nn.Module, CtrBatch, tuple[Term, ...]]:
    """A model with the same weights whenever it is made, its pages and its terms."""
    if name == "ocarm":
        terms = ocarm_terms(test_ocarm.CONFIG, test_ocarm.teacher())
        return test_ocarm.student(), test_ocarm.batch(), tuple(terms)
    if name == "qarm":
        return test_qarm.model_of(), test_qarm.PAGES, (CLICKS,)
    return test_sarm.ranker(test_sarm.anchored()), test_sarm.batch(), (CLICKS,)


def pages(batch: CtrBatch, first: int, end: int) -> CtrBatch:
    """Some pages of a batch."""
    own = (batch.request >= first) & (batch.request < end)
    return replace(
        batch, history=batch.history[first:end], query=batch.query[first:end],
        request=batch.request[own] - first, candidate=batch.candidate[own],
        features=batch.features[own], clicked=batch.clicked[own],
        extra={name: column[first:end] for name, column in batch.extra.items()},
    )  # fmt: skip


def learnt(name: str, first: int = 0, end: int | None = None) -> dict[str, Any]:
    """The logs and the summed gradients of a step on some pages."""
    model, batch, terms = case(name)
    output = CtrStep(terms)(model, pages(batch, first, len(batch.history) if end is None else end))
    output.loss.backward()
    parallel.sum_gradients(model.parameters())
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logs": {k: float(v) for k, v in output.logs.items()}, "gradients": gradients}


def _worker(rank: int) -> dict[str, Any]:
    """The first worker has one page, the second one all others."""
    return {name: learnt(name, rank, None if rank else 1) for name in CASES}


@pytest.fixture(scope="module")
def workers() -> list[dict[str, Any]]:
    return run_workers(_worker, 2)


@pytest.mark.parametrize("name", CASES)
def test_two_workers_with_unequal_pages_equal_one(name: str, workers: list[dict[str, Any]]) -> None:
    alone = learnt(name)
    for found in (worker[name] for worker in workers):
        for log, value in alone["logs"].items():
            if log.startswith("loss/"):
                assert found["logs"][log] == pytest.approx(value, rel=1e-5), log
        assert found["gradients"].keys() == alone["gradients"].keys()
        for parameter, gradient in alone["gradients"].items():
            torch.testing.assert_close(found["gradients"][parameter], gradient, msg=parameter)
    assert any(gradient.abs().max() > 0 for gradient in alone["gradients"].values())

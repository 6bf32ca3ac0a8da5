"""What the workers of a step exchange is what the formula says."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.communication import counted_step
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.step import JointStep
from tests import tiny
from tests.gloo import run_workers
from tests.training.test_gradient_cache import ROWS

STEPS = {
    "whole": JointStep(ObjectiveConfig()),
    "in parts": JointStep(ObjectiveConfig(), micro_batch_size=1, micro_tokens=10_000),
    "clicks alone": JointStep(ObjectiveConfig(generation=0.0, reconstruction=0.0)),
}


def _count(rank: int, workers: int) -> dict[str, Any]:
    mine = tiny.sequences(*ROWS[rank::workers])
    found = {}
    for name, step in STEPS.items():
        counts, sizes = counted_step(tiny.model(), step, tiny.batch(mine))
        found[name] = dict(counts), sizes.bytes()
    return found


@pytest.mark.parametrize("workers", [2, 3])
def test_a_step_exchanges_the_bytes_of_the_formula(workers: int) -> None:
    for rank, found in enumerate(run_workers(_count, workers, workers)):
        for name, (counted, formula) in found.items():
            # The gradient cache also agrees on the numbers of its chunks and of its micro-batches.
            extra = 16 if name == "in parts" else 0
            assert counted["gathered float"] == formula["item vectors"], (rank, name)
            assert counted["gathered whole"] == formula["item table"], (rank, name)
            summed = formula["gradients"] + formula["their gradients"] + formula["counts"] + extra
            assert counted["summed float"] + counted["summed whole"] == summed, (rank, name)

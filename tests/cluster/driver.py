"""A driver to be killed: `python -m tests.cluster.driver RUN ROWS WORKERS [--resume]`."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from karma_ray.cluster.training import run_training
from karma_ray.cluster.worker import TrainJob
from karma_ray.training.step import StepOutput
from tests.cluster import test_training as small

STEPS = 40


def slow_step(seconds: float, model: nn.Module, batch: Any) -> StepOutput:
    """A step that leaves time to be killed in."""
    time.sleep(seconds)
    return small._step(model, batch)


def job(run: str, rows: str, workers: int, seconds: float = 0.0) -> TrainJob:
    """40 steps, a checkpoint every 5; noise from the collator's own generator."""
    whole = small._job(
        Path(run), rows, steps=STEPS, checkpoint_every=5, num_workers=workers, threads_per_worker=1
    )
    batches = partial(small._batches, rows, small._make_collator)
    changed = {"make_batches": batches, "step": partial(slow_step, seconds)}
    return TrainJob(**{**vars(whole), **changed})


if __name__ == "__main__":
    run, rows, workers = sys.argv[1:4]
    run_training(
        job(run, rows, int(workers), 0.05), resume="--resume" in sys.argv[4:], progress=False
    )

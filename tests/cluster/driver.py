"""A driver of its own: `python -m tests.cluster.driver RUN ROWS WORKERS [--resume] [--elastic]`."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from karma_ray.cluster.training import run_training
from karma_ray.runs.worker import TrainJob
from karma_ray.training.parallel import rank, world_size
from karma_ray.training.step import StepOutput
from tests.cluster import test_training as small

STEPS = 40


def slow_step(seconds: float, model: nn.Module, batch: Any, *_: object) -> StepOutput:
    """A step that leaves time to be killed in."""
    time.sleep(seconds)
    return small._step(model, batch)


def counted_step(counts: str, model: nn.Module, batch: Any, *_: object) -> StepOutput:
    """A slow step that notes the number of workers."""
    if rank() == 0:
        with open(counts, "a") as lines:
            lines.write(f"{world_size()}\n")
    return slow_step(0.5, model, batch)


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
    elastic = "--elastic" in sys.argv[4:]
    work = job(run, rows, int(workers), 0.05)
    if elastic:
        training = replace(work.training, min_workers=1)
        work = replace(work, training=training, step=partial(counted_step, f"{run}.workers"))
    run_training(
        work, resume="--resume" in sys.argv[4:], max_failures=2 if elastic else 0, progress=False
    )

"""Training of one stage, in this process or by workers that the caller starts.

Checkpoints are stored in RUN/checkpoints/STAGE/ and are the same in both cases, so a run can be
continued with another number of workers, or with none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyarrow as pa

from karma_ray.artifacts import absolute, exists, join, read_json
from karma_ray.config import Config
from karma_ray.errors import InputError
from karma_ray.model.device import this_device, using_gpus
from karma_ray.runs import stopping
from karma_ray.runs.batches import local_blocks
from karma_ray.runs.run_log import ProgressLine
from karma_ray.runs.worker import TrainJob, run_worker
from karma_ray.training.checkpoints.files import CheckpointFiles
from karma_ray.training.loop import Record
from karma_ray.training.order import Order, Window

Distribute = Callable[[TrainJob, int], dict[str, Any]]
"""(job, max_failures): trains with `training.num_workers` workers, restarting after lost ones."""

P = ParamSpec("P")
R = TypeVar("R")


def on_its_devices(
    compute: Callable[Concatenate[Config, P], R],
) -> Callable[Concatenate[Config, P], R]:
    """Let all that `compute` does for a configuration follow its `training.use_gpu`."""

    @wraps(compute)
    def run(config: Config, /, *args: P.args, **options: P.kwargs) -> R:
        with using_gpus(config.training.use_gpu != "false"):
            return compute(config, *args, **options)

    return run


def run_training(
    job: TrainJob,
    *,
    resume: bool = False,
    max_failures: int = 0,
    progress: bool = True,
    distribute: Distribute | None = None,
) -> dict[str, Any]:
    """Train one stage; returns its summary (`weights`, `steps`, `seconds`, `last`, `valid`).

    With `resume` a finished stage is returned unchanged and an unfinished one is continued.
    Without `distribute`, or with `training.num_workers=0`, the stage is trained in this process;
    otherwise up to `max_failures` restarts after lost workers continue from the newest complete
    checkpoint. Raises InputError when the run already holds checkpoints of this stage and
    `resume` is false, and any error of this package that a worker raised, such as NonFiniteLoss.
    """
    job = replace(job, run=absolute(job.run))  # workers have another working directory
    if resume and exists(join(job.final, "summary.json")):
        summary: dict[str, Any] = read_json(join(job.final, "summary.json"))
        return summary
    if not resume and (exists(job.final) or CheckpointFiles(job.checkpoints).steps()):
        message = f"already holds checkpoints of the stage {job.stage}; resume, or use a new folder"
        raise InputError("run folder", job.run, message)
    if distribute is None or job.training.num_workers == 0:
        with stopping.deferred():
            return run_worker(job, LocalChannel(job.training.use_gpu), progress)
    with ProgressLine(job.run, job.stage, job.training.steps, progress):
        return distribute(job, max_failures)


class LocalChannel:
    """The channel of a training in the driver's process."""

    in_driver = True

    def __init__(self, use_gpu: str = "auto") -> None:
        self.device = this_device("cpu" if use_gpu == "false" else None)
        if use_gpu == "true" and self.device.type == "cpu":
            raise InputError("training.use_gpu", use_gpu, "needs a GPU, and this process has none")

    def read_blocks(self, order: Order, windows: Sequence[Window]) -> Iterator[pa.Table]:
        """Read the rows of training batches."""
        return local_blocks(order, windows)

    def report(self, record: Record) -> None:
        """Do nothing: the run log already has the record."""

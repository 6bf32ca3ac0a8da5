"""Training on Ray Train, or in this process when `num_workers` is 0.

Checkpoints lie in RUN/checkpoints/STAGE/ and are the same in both cases (training/store.py), so a
run continues with another number of workers, or without Ray. Ray Train is told metrics only: what
a restart continues from is what lies in the run folder.
"""

from __future__ import annotations

import tempfile
import uuid
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from karma_ray.artifacts import absolute, exists, join, read_json
from karma_ray.cluster.run_log import ProgressLine
from karma_ray.cluster.worker import TrainJob, run_worker
from karma_ray.errors import (
    InputError,
    KarmaRayError,
    NonFiniteLoss,
    StorageError,
    TakenOver,
)
from karma_ray.training.loop import Record
from karma_ray.training.vault import Vault

COLLECTIVE_TIMEOUT_S = 1800  # an evaluation on rank 0 keeps the others waiting


def run_training(
    job: TrainJob, *, resume: bool = False, max_failures: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Train one stage; returns its summary (`weights`, `steps`, `seconds`, `last`, `valid`).

    With `resume` a finished stage is returned as it is and an unfinished one continued. Raises
    InputError when the run already holds checkpoints of this stage and `resume` is false, and
    whatever error of this package a worker raised (NonFiniteLoss above all). `max_failures`
    restarts after lost workers, from the newest whole checkpoint; with `training.min_workers`
    it starts with those that are there and goes on with fewer when machines are lost; every
    minute Ray looks whether there are more, and restarts with them from the newest checkpoint.
    """
    job = replace(job, run=absolute(job.run))  # workers start in another folder
    if resume and exists(join(job.final, "summary.json")):
        summary: dict[str, Any] = read_json(join(job.final, "summary.json"))
        return summary
    if not resume and (exists(job.final) or Vault(job.checkpoints).steps()):
        message = f"already holds checkpoints of the stage {job.stage}; resume, or use a new folder"
        raise InputError("run folder", job.run, message)
    if job.training.num_workers == 0:
        return run_worker(job, LocalChannel(), progress)
    with ProgressLine(job.run, job.stage, job.training.steps, progress):
        return _run_on_ray(job, max_failures)


class LocalChannel:
    """A training inside the driver's process."""

    use_ray = False

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def report(self, record: Record) -> None:
        """Nobody listens: the run log has it."""


class RayChannel:
    """A worker inside Ray Train."""

    use_ray = True

    def __init__(self) -> None:
        import ray.train.torch

        self.device = ray.train.torch.get_device()

    def report(self, record: Record) -> None:
        """`ray.train.report`: Tune's schedulers listen."""
        import ray.train

        ray.train.report(dict(record))


def _run_on_ray(job: TrainJob, max_failures: int) -> dict[str, Any]:
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from karma_ray.cluster.session import connect

    connect()
    workers, fewest = job.training.num_workers, job.training.min_workers
    use_gpu = ray.cluster_resources().get("GPU", 0) >= (fewest or workers)
    # Ray keeps its own state in a folder that nobody needs afterwards: nothing of it is in the
    # run's store, whose outages therefore do not reach Ray.
    with tempfile.TemporaryDirectory(prefix="karma-ray-") as folder:
        trainer = TorchTrainer(
            # Bound, not in train_loop_config: the controller would unpickle that and import the
            # model.
            partial(_ray_worker, job),
            torch_config=TorchConfig(
                backend="nccl" if use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S
            ),
            scaling_config=ray.train.ScalingConfig(
                num_workers=(fewest, workers) if fewest else workers,
                use_gpu=use_gpu,
            ),
            run_config=ray.train.RunConfig(
                name=f"{job.stage}-{uuid.uuid4().hex[:8]}",  # a known name would be continued
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as failure:
            raise _own_error(failure) or failure from None
    summary: dict[str, Any] = result.return_value
    if "error" in summary:
        error: KarmaRayError = summary["error"]
        raise error
    return summary


def _ray_worker(job: TrainJob) -> dict[str, Any]:
    try:
        return run_worker(job, RayChannel())
    except (NonFiniteLoss, StorageError, TakenOver) as error:
        # Returned, not raised: all workers stop here, and a restart would only meet it again.
        return {"error": error}


def _own_error(error: Exception) -> KarmaRayError | None:
    """The error of this package that workers raised, out of Ray's wrappers."""
    pending: list[Any] = list(getattr(error, "worker_failures", {}).values())
    while pending:
        found = pending.pop(0)
        if isinstance(found, KarmaRayError):
            return found
        if found is not None:
            names = ("_base_exc", "cause", "__cause__")
            pending += [getattr(found, name, None) for name in names]
    return None

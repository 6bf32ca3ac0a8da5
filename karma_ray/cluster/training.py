"""Training on Ray Train, or in this process when `num_workers` is 0.

Checkpoints lie in RUN/checkpoints/STAGE/step-NNNNNNN/; `latest.json` beside them names the newest
one that every worker has finished writing. A restart continues from there: after a SIGKILL Ray's
own register may lag one checkpoint behind (it registers when it polls), the files do not. The
same layout without Ray lets a run continue with another number of workers.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from karma_ray.artifacts import absolute, exists, join, open_filesystem, read_json, write_json
from karma_ray.cluster.run_log import ProgressLine
from karma_ray.cluster.worker import TrainJob, run_worker
from karma_ray.errors import InputError, KarmaRayError, NonFiniteLoss
from karma_ray.training.checkpoint import Progress
from karma_ray.training.loop import Record
from karma_ray.training.parallel import barrier, rank

KEPT_CHECKPOINTS = 2
COLLECTIVE_TIMEOUT_S = 1800  # an evaluation on rank 0 keeps the others waiting


def run_training(
    job: TrainJob, *, resume: bool = False, max_failures: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Train one stage; returns its summary (`weights`, `steps`, `seconds`, `last`, `valid`).

    With `resume` a finished stage is returned as it is and an unfinished one continued. Raises
    InputError when the run already holds checkpoints of this stage and `resume` is false, and
    whatever error of this package a worker raised (NonFiniteLoss above all). `max_failures`
    restarts after lost workers, from the newest checkpoint.
    """
    job = replace(job, run=absolute(job.run))  # workers start in another folder
    if resume and exists(join(job.final, "summary.json")):
        summary: dict[str, Any] = read_json(join(job.final, "summary.json"))
        return summary
    if not resume and exists(job.checkpoints):
        message = f"already holds checkpoints of the stage {job.stage}; resume, or use a new folder"
        raise InputError("run folder", job.run, message)
    if job.training.num_workers == 0:
        return run_worker(job, LocalChannel(job.checkpoints), progress)
    with ProgressLine(job.run, job.stage, job.training.steps, progress):
        return _run_on_ray(job, max_failures)


class LocalChannel:
    """Checkpoints of a training inside the driver's process."""

    use_ray = False

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def report(self, record: Record) -> None:
        """Nobody listens: the run log has it."""

    def save(self, step: int, record: Record, write: Callable[[str], None]) -> None:
        """Write, then point `latest.json` at it, then drop older ones."""
        fs, path = open_filesystem(self._folder)
        name = _name(step)
        fs.makedirs(f"{path}/{name}", exist_ok=True)
        with tempfile.TemporaryDirectory() as local:
            write(local)
            for file in os.listdir(local):
                fs.put_file(os.path.join(local, file), f"{path}/{name}/{file}")
        _point_at(self._folder, name)
        for old in sorted(fs.glob(f"{path}/step-*"))[:-KEPT_CHECKPOINTS]:
            fs.rm(old, recursive=True)

    def restored(self, read: Callable[[str], Progress]) -> Progress | None:
        """Read the checkpoint that `latest.json` names."""
        return _read_latest(self._folder, read)


class RayChannel:
    """Reports and checkpoints of a worker inside Ray Train."""

    use_ray = True

    def __init__(self, folder: str) -> None:
        import ray.train.torch

        self._folder = folder
        self.device = ray.train.torch.get_device()

    def report(self, record: Record) -> None:
        """`ray.train.report`: Tune's schedulers listen."""
        import ray.train

        ray.train.report(dict(record))

    def save(self, step: int, record: Record, write: Callable[[str], None]) -> None:
        """Upload every worker's part, then point `latest.json` at the whole."""
        import ray.train

        name = _name(step)
        with tempfile.TemporaryDirectory() as local:
            write(local)
            checkpoint = ray.train.Checkpoint.from_directory(local)
            ray.train.report(dict(record), checkpoint=checkpoint, checkpoint_dir_name=name)
        barrier()
        if rank() == 0:
            _point_at(self._folder, name)

    def restored(self, read: Callable[[str], Progress]) -> Progress | None:
        """The newest complete checkpoint; Ray's own register where there is no pointer."""
        import ray.train

        found = _read_latest(self._folder, read)
        checkpoint = ray.train.get_checkpoint()
        if found is not None or checkpoint is None:
            return found
        with checkpoint.as_directory() as folder:
            return read(folder)


def _run_on_ray(job: TrainJob, max_failures: int) -> dict[str, Any]:
    import pyarrow.fs
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from karma_ray.cluster.session import connect

    connect()
    workers = job.training.num_workers
    use_gpu = ray.cluster_resources().get("GPU", 0) >= workers
    fs, path = open_filesystem(job.checkpoints)
    remote = None
    if "://" in job.run:
        remote = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    trainer = TorchTrainer(
        # Bound, not in train_loop_config: the controller would unpickle that and import the model.
        partial(_ray_worker, job),
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S
        ),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=ray.train.RunConfig(
            name=path.rsplit("/", 1)[1],
            storage_path=path.rsplit("/", 1)[0],
            storage_filesystem=remote,
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _own_error(error) or error from None
    summary: dict[str, Any] = result.return_value
    if "non_finite" in summary:
        raise NonFiniteLoss(summary["non_finite"])
    return summary


def _ray_worker(job: TrainJob) -> dict[str, Any]:
    try:
        return run_worker(job, RayChannel(job.checkpoints))
    except NonFiniteLoss as error:
        # Returned, not raised: all workers stop here, and a restart would only meet it again.
        return {"non_finite": str(error)}


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


def _name(step: int) -> str:
    return f"step-{step:07d}"


def _point_at(folder: str, name: str) -> None:
    write_json({"checkpoint": name}, join(folder, "latest.json"))


def _read_latest(folder: str, read: Callable[[str], Progress]) -> Progress | None:
    if not exists(join(folder, "latest.json")):
        return None
    source = join(folder, read_json(join(folder, "latest.json"))["checkpoint"])
    if "://" not in source:
        return read(source)
    fs, path = open_filesystem(source)
    with tempfile.TemporaryDirectory() as local:
        for file in fs.ls(path, detail=False):
            fs.get_file(file, os.path.join(local, file.rsplit("/", 1)[1]))
        return read(local)

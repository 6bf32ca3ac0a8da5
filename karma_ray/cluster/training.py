"""Training on Ray Train.

Ray Train gets metrics only. A restart continues from the checkpoints in the run folder, which are
the same as without Ray.
"""

from __future__ import annotations

import logging
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.data._internal.stats import get_or_create_stats_actor
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback

from karma_ray.cluster.accelerators import CPU, GPU, device_here, training_on_gpus
from karma_ray.cluster.backend import Collectives
from karma_ray.cluster.batches import ray_blocks
from karma_ray.cluster.session import connect, joins_a_cluster, quiet
from karma_ray.cluster.waiting import telling, topic_of
from karma_ray.errors import KarmaRayError, NonFiniteLoss, StorageError, TakenOver
from karma_ray.runs import training as runs
from karma_ray.runs.worker import TrainJob, run_worker
from karma_ray.training.loop import Record
from karma_ray.training.order import Order, Window

COLLECTIVE_TIMEOUT_S = 1800  # the other workers wait while one reads or writes what is remote


class RayChannel:
    """The channel of a worker inside Ray Train."""

    in_driver = False

    def __init__(self, topic: str) -> None:
        self.device = device_here(topic)

    def read_blocks(self, order: Order, windows: Sequence[Window]) -> Iterator[pa.Table]:
        """Read the rows of training batches."""
        return ray_blocks(order, windows)

    def report(self, record: Record) -> None:
        """Call `ray.train.report`, which Tune's schedulers read."""
        import ray.train

        ray.train.report(dict(record))


class _Trainer(TorchTrainer):
    """Has no actor for datasets that the driver passes to workers: they open their own data."""

    def _create_default_callbacks(self) -> list[Any]:
        found = super()._create_default_callbacks()
        return [callback for callback in found if not isinstance(callback, DatasetsCallback)]


def run_training(job: TrainJob, **options: Any) -> dict[str, Any]:
    """Call `karma_ray.runs.training.run_training` with Ray Train's workers."""
    return runs.run_training(job, distribute=train_on_ray, **options)


def train_on_ray(job: TrainJob, max_failures: int) -> dict[str, Any]:
    """Train one stage with Ray Train's workers; returns the summary of rank 0.

    With `training.min_workers` it starts with the available workers and continues with fewer when
    machines are lost; every minute Ray checks whether there are more, and restarts with them from
    the newest checkpoint. Raises any error of this package that a worker raised, and InputError if
    there can never be enough GPUs or CPUs.
    """
    import ray.train

    connect()
    workers, fewest = job.training.num_workers, job.training.min_workers
    use_gpu = training_on_gpus(job.training)
    if joins_a_cluster():
        # Ray Data starts this actor where it is first used, for as long as the cluster lives: on
        # the node of a training worker it would keep that node, and its GPU, from being returned.
        get_or_create_stats_actor()
    # The controller would wait for this one, which starts no sooner than the controller itself.
    get_or_create_autoscaling_coordinator()
    # Ray's own state is in a temporary folder instead of the run's store, because it is not needed
    # afterwards, and outages of the store then do not affect Ray.
    with tempfile.TemporaryDirectory(prefix="karma-ray-") as folder:
        trainer = _Trainer(
            # Bound instead of passed in train_loop_config, which the controller would unpickle,
            # importing the model: seconds before it starts the workers.
            partial(_ray_worker, job, topic_of(job.stage)),
            torch_config=Collectives(timeout_s=COLLECTIVE_TIMEOUT_S, run=job.run, stage=job.stage),
            scaling_config=ray.train.ScalingConfig(
                num_workers=(fewest, workers) if fewest else workers,
                use_gpu=use_gpu,
            ),
            run_config=ray.train.RunConfig(
                name=f"{job.stage}-{uuid.uuid4().hex[:8]}",  # a known name would be resumed
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
            ),
        )
        try:
            with telling(job.stage, GPU if use_gpu else CPU, fewest or workers):
                result = trainer.fit()
        except ray.train.TrainingFailedError as failure:
            raise _own_error(failure) or failure from None
    summary: dict[str, Any] = result.return_value
    if "error" in summary:
        error: KarmaRayError = summary["error"]
        raise error
    return summary


def _ray_worker(job: TrainJob, topic: str) -> dict[str, Any]:
    from ray.train.v2._internal.execution import context

    quiet()
    # It is named by its file, not below ray.train, and would log the metrics of every report, the
    # last of them after the driver's closing screen.
    context.logger.setLevel(logging.WARNING)
    try:
        return run_worker(job, RayChannel(topic))
    except (NonFiniteLoss, StorageError, TakenOver) as error:
        # Returned instead of raised: all workers stop, and a restart would meet the same error.
        return {"error": error}


def _own_error(error: Exception) -> KarmaRayError | None:
    """Return the error of this package inside Ray's wrappers, or None."""
    pending: list[Any] = list(getattr(error, "worker_failures", {}).values())
    while pending:
        found = pending.pop(0)
        if isinstance(found, KarmaRayError):
            return found
        if found is not None:
            names = ("_base_exc", "cause", "__cause__")
            pending += [getattr(found, name, None) for name in names]
    return None

"""Whether work is computed on GPUs, decided in one place and said in one sentence.

A GPU counts if it is up or if the autoscaler may add it: the demand of the workers then makes the
cluster grow. What could never come is refused before anything starts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
import torch
from ray.experimental.internal_kv import _internal_kv_put
from ray.train.torch import get_device

from karma_ray.artifacts import open_filesystem
from karma_ray.cluster.session import joins_a_cluster
from karma_ray.cluster.supply import Reach, Supply, supply
from karma_ray.errors import InputError
from karma_ray.model.device import may_use_gpus
from karma_ray.training.config import TrainingConfig

LOG = logging.getLogger(__name__)

GPU = {"GPU": 1.0}
CPU = {"CPU": 1.0}
ENCODER_CPUS = 0.9
"""What an encoder on CPUs holds of a CPU: a pool that fills all machines leaves room to write."""
BASE_MEMORY = 1 << 30
"""Bytes that a process needs beside its model, roughly: libraries, texts and activations."""
NO_CUDA = "a GPU was assigned, but its process finds no CUDA: computing on the CPU"


def training_on_gpus(training: TrainingConfig, found: Supply | None = None) -> bool:
    """Decide between GPUs and CPUs for training, and log the choice.

    Raises InputError if the cluster, with all that its autoscaler may add, has too few of them.
    """
    found = found or supply()
    field = "training.min_workers" if training.min_workers else "training.num_workers"
    workers, fewest = training.num_workers, training.min_workers or training.num_workers
    gpus, cpus = found.reach(GPU), found.reach(CPU)
    if training.use_gpu != "false" and gpus.possible >= fewest:
        LOG.info("training on %s: %s", _count(min(workers, gpus.possible), "GPU"), _said(gpus))
        return True
    if training.use_gpu == "true":
        problem = f"needs {_count(fewest, 'GPU')}, one for each worker; {_said(gpus)}"
        raise InputError("training.use_gpu", "true", problem)
    if cpus.possible < fewest:
        problem = f"needs {_count(fewest, 'CPU')}, one for each worker; {_said(cpus, 'CPU')}"
        raise InputError(field, fewest, problem)
    LOG.info("training on CPUs: %s", _why_not(training, fewest, gpus))
    return False


@dataclass(frozen=True)
class Pool:
    """A pool of encoders."""

    size: int
    num_gpus: float
    """GPUs of each encoder; 0 computes on a CPU."""

    @property
    def need(self) -> dict[str, float]:
        """What one encoder waits for."""
        return {"GPU": self.num_gpus} if self.num_gpus else {"CPU": ENCODER_CPUS}

    @property
    def options(self) -> dict[str, Any]:
        """How `map_batches` runs the pool: beside it there is always room for a writer."""
        return {
            "compute": ray.data.ActorPoolStrategy(size=self.size),
            "num_cpus": 0 if self.num_gpus else ENCODER_CPUS,
            "num_gpus": self.num_gpus,
        }


def encoders(
    purpose: str, most: int, asked: int | None = None, *, memory: float = 0.0,
    on_gpus: bool = True, found: Supply | None = None,
) -> Pool:  # fmt: skip
    """Return the pool for `most` portions of work, and log the choice.

    Its size is the number `asked` for, or else that of the GPUs that are up or may be added, or of
    the CPUs that are up if there is none, each with `memory` bytes. Work that gains nothing from a
    GPU says so by `on_gpus`; a run that may not use GPUs has said so (`using_gpus`). Raises
    InputError if more are asked for than may ever run together.
    """
    found = found or supply()
    gpus, cpus = found.reach(GPU) if on_gpus and may_use_gpus() else Reach(0), found.reach(CPU)
    if asked is None:
        room = found.reach(CPU | {"memory": memory} if memory else CPU).up
        size = max(1, min(gpus.possible or room, most))
    else:
        size = asked
    if gpus.possible:
        LOG.info("%s with %s on GPUs: %s", purpose, _count(size, "encoder"), _said(gpus))
        return Pool(size, gpu_share(gpus.possible, size))
    if size > cpus.possible:
        raise InputError("--actors", size, f"needs {_count(size, 'CPU')}; {_said(cpus, 'CPU')}")
    said = _said(gpus) if may_use_gpus() else "training.use_gpu is false"
    why = f": {said}" if on_gpus else ""
    LOG.info("%s with %s on CPUs%s", purpose, _count(size, "encoder"), why)
    return Pool(size, 0.0)


def memory_for(bundle: str) -> int:
    """Return the bytes that a process with a bundle's model needs, roughly."""
    fs, path = open_filesystem(bundle)
    return BASE_MEMORY + 2 * int(fs.du(path))  # weights, and a copy while they are loaded


def gpu_share(gpus: float, workers: int) -> float:
    """Return the share of a GPU for each of `workers`, so that a whole number fills each GPU."""
    return 1.0 / max(1, -(-workers // int(gpus))) if gpus >= 1 else 0.0


def trial_resources(slots: int) -> tuple[int, float]:
    """Return CPUs and GPUs of each of `slots` trials that run at once."""
    found = supply()
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1.0) / slots))
    gpus = min(1.0, found.reach(GPU).possible / slots)
    if gpus:  # one node must have both
        cpus = min(cpus, max(1, int(found.smallest_beside("GPU", "CPU") * gpus)))
    return cpus, gpus


def share_of_gpus_up(replicas: int) -> float:
    """Return the GPUs of each of `replicas` of an endpoint: a share of those that are up and free.

    The autoscaler is not asked for more, as an endpoint keeps what it has for as long as it lives.
    """
    share = gpu_share(ray.available_resources().get("GPU", 0.0), replicas)
    LOG.info("serving with %s on %s", _count(replicas, "replica"), "GPUs" if share else "CPUs")
    return share


def device_here(topic: str) -> torch.device:
    """Return the device that Ray has assigned to this worker, or the CPU.

    Where a GPU was assigned but CUDA is absent, it is the CPU, which the driver is told under
    `topic` (waiting.py), as workers' own output may be hidden.
    """
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device(get_device())
    LOG.warning(NO_CUDA)
    _internal_kv_put(topic, NO_CUDA)
    return torch.device("cpu")


def _why_not(training: TrainingConfig, fewest: int, gpus: Reach) -> str:
    if training.use_gpu == "false":
        return "training.use_gpu is false"
    if not gpus.possible:
        return _said(gpus)
    use = f"--set training.num_workers={gpus.possible}"
    some = _count(gpus.possible, "GPU")
    are = "is" if gpus.possible == 1 else "are"
    added = f", with the {gpus.more} that the autoscaler may add," if gpus.more else ""
    return f"{some}{added} {are} fewer than the {fewest} workers; {use} would use them"


def _said(reach: Reach, name: str = "GPU") -> str:
    """Say what is up and what may be added."""
    if not reach.possible:
        grows = " in the cluster, and no autoscaler that may add one" if joins_a_cluster() else ""
        return f"there is no {name}{grows}"
    up = "1 is up" if reach.up == 1 else f"{reach.up or 'none'} are up"
    return f"{up}, the autoscaler may add {f'up to {reach.more}' if reach.more else 'none'}"


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("" if number == 1 else "s")

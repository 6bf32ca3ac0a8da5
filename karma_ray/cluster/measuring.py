"""Evaluation where the cluster has a GPU, and by more processes than one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
from numpy.typing import NDArray

from karma_ray.cluster.accelerators import CPU, GPU, memory_for
from karma_ray.cluster.session import connect, joins_a_cluster
from karma_ray.cluster.supply import Reach, supply
from karma_ray.cluster.waiting import telling
from karma_ray.model.device import may_use_gpus
from karma_ray.runs.evaluation_shares import Share

LOG = logging.getLogger(__name__)


def measure_on_a_gpu(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call `measure` on a GPU of the cluster if this process has none, and else here.

    A GPU that the autoscaler may add counts too, and none counts for a run that may not use GPUs.
    No Ray is started for it, as a local one has no more than this process. Errors of `measure` are
    raised as they are.
    """
    if not may_use_gpus() or torch.cuda.is_available():
        return measure()
    if not (ray.is_initialized() or joins_a_cluster()):
        return measure()
    connect()
    if not supply().reach(GPU).possible:
        return measure()
    LOG.info("evaluating on a GPU of the cluster")
    with telling("evaluation", GPU, 1):
        # With its process goes the memory that it has taken on the GPU.
        remote = ray.remote(num_gpus=1, max_calls=1, max_retries=2)(_call)
        found: dict[str, Any] = ray.get(remote.remote(measure))
    return found


def enlist_on_ray(share: Share, most: int, bundle: str) -> list[Iterator[NDArray[Any]]]:
    """Start at most `most` processes on GPUs, or else CPUs, that are up; returns what they yield.

    This process has the place of one, as it ranks too. A process that dies is started again.
    """
    connect()
    found, memory = supply(), memory_for(bundle)
    gpus = found.reach(GPU) if may_use_gpus() else Reach(0)
    room = gpus.up if gpus.up else found.reach(CPU | {"memory": memory}).up
    count = min(most, room - 1)
    if count < 1:
        return []
    options = {"num_gpus": 1} if gpus.up else {"num_cpus": 1, "memory": memory}
    ranking = ray.remote(max_retries=2, **options)(_ranking)
    shared = [ray.put(share)]
    running = [ranking.remote(shared, rank, count + 1) for rank in range(1, count + 1)]
    return [map(ray.get, one) for one in running]


def _ranking(shared: list[ray.ObjectRef], rank: int, count: int) -> Iterator[NDArray[Any]]:
    """Run as a task that yields values as soon as they are there."""
    share: Share = ray.get(shared[0])
    # Not `yield from`, which would pass on what Ray sends to generators.
    for values in share(rank, count):  # noqa: UP028
        yield values


def _call(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return measure()

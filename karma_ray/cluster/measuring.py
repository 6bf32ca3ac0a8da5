"""Evaluation where the cluster has a GPU, and by more processes than one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import ray
import torch
from numpy.typing import NDArray
from ray.util.placement_group import placement_group, remove_placement_group

from karma_ray.cluster.accelerators import CPU, GPU, memory_for
from karma_ray.cluster.elsewhere import own_errors
from karma_ray.cluster.session import connect, joins_a_cluster
from karma_ray.cluster.supply import Resources, supply
from karma_ray.cluster.waiting import telling
from karma_ray.model.device import may_use_gpus
from karma_ray.runs.evaluation_shares import Share

LOG = logging.getLogger(__name__)

GROWING_S = 300.0
"""How long an evaluation waits for machines that the autoscaler may add; it goes on without them,
as they may never come."""


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
    with own_errors(), telling("evaluation", GPU, 1):
        # With its process goes the memory that it has taken on the GPU.
        remote = ray.remote(num_gpus=1, max_calls=1, max_retries=2)(_call)
        found: dict[str, Any] = ray.get(remote.remote(measure))
    return found


def enlist_on_ray(
    share: Share, most: int, bundle: str, later: int = 0
) -> list[Iterator[NDArray[Any]]]:
    """Start at most `most` processes on GPUs, or else CPUs, that are up; returns what they yield.

    If there is no place yet for `later` of them, the autoscaler may add machines first. This
    process has the place of one, as it ranks too. A process that dies is started again.
    """
    connect()
    found, memory = supply(), memory_for(bundle)
    on_gpus = may_use_gpus() and found.reach(GPU).up > 0
    need = GPU if on_gpus else CPU | {"memory": memory}
    room = found.reach(need)
    if (asked := min(most, later, room.possible - 1)) > room.up - 1:
        _grow(need, asked)
        room = supply().reach(need)
    count = min(most, room.up - 1)
    if count < 1:
        return []
    options = {"num_gpus": 1} if on_gpus else {"num_cpus": 1, "memory": memory}
    ranking = ray.remote(max_retries=2, **options)(_ranking)
    shared = [ray.put(share)]
    running = [ranking.remote(shared, rank, count + 1) for rank in range(1, count + 1)]
    return [map(ray.get, one) for one in running]


def _grow(need: Resources, count: int) -> None:
    """Ask for the places of `count` processes until all are there, or for GROWING_S."""
    places = [placement_group([dict(need)]) for _ in range(count)]
    try:
        with telling("evaluation", GPU if "GPU" in need else CPU, count):
            ready = [place.ready() for place in places]
            ray.wait(ready, num_returns=count, timeout=GROWING_S)
    finally:
        for place in places:  # the processes ask anew, and machines stay for a while without work
            remove_placement_group(place)


def _ranking(shared: list[ray.ObjectRef], rank: int, count: int) -> Iterator[NDArray[Any]]:
    """Run as a task that yields values as soon as they are there."""
    share: Share = ray.get(shared[0])
    # Not `yield from`, which would pass on what Ray sends to generators.
    for values in share(rank, count):  # noqa: UP028
        yield values


def _call(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return measure()

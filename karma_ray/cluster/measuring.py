"""Evaluation where the cluster has a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import ray
import torch

from karma_ray.cluster.accelerators import GPU
from karma_ray.cluster.session import connect
from karma_ray.cluster.supply import supply
from karma_ray.cluster.waiting import telling
from karma_ray.model.device import may_use_gpus

LOG = logging.getLogger(__name__)


def measure_on_a_gpu(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call `measure` on a GPU of the cluster if this process has none, and else here.

    A GPU that the autoscaler may add counts too, and none counts for a run that may not use GPUs.
    Errors of `measure` are raised as they are.
    """
    if not may_use_gpus():
        return measure()
    connect()
    if torch.cuda.is_available() or not supply().reach(GPU).possible:
        return measure()
    LOG.info("evaluating on a GPU of the cluster")
    with telling("evaluation", GPU, 1):
        # With its process goes the memory that it has taken on the GPU.
        remote = ray.remote(num_gpus=1, max_calls=1, max_retries=2)(_call)
        found: dict[str, Any] = ray.get(remote.remote(measure))
    return found


def _call(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return measure()

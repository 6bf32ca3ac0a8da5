"""Joining a Ray cluster, or starting a local one that listens on loopback only."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import ray
import ray.data

from karma_ray.node_disk import LIMIT

LOG = logging.getLogger(__name__)

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray trains in a thread of the worker, and glibc's heaps of threads return all freed memory:
    # without this setting every step would pay for page faults again.
    "MALLOC_ARENA_MAX": "1",
}
_ALONE = {
    # A single machine is not preempted with a warning, and every further process of Ray wakes up a
    # hundred times a second.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def connect(num_cpus: int | None = None) -> None:
    """Join the cluster of this process, or start a local one; does nothing if connected.

    Inside `ray job submit`, or with RAY_ADDRESS set, the existing cluster is joined. `num_cpus` is
    the number of logical CPUs of a local cluster (default: the machine's, at least 4).
    """
    quiet()
    if ray.is_initialized():
        return
    joins = joins_a_cluster()
    for name, value in (_QUIET if joins else _QUIET | _ALONE).items():
        os.environ.setdefault(name, value)
    told = [*_QUIET, *([LIMIT] if LIMIT in os.environ else [])]
    root = str(Path(__file__).resolve().parents[2])
    environment = {"env_vars": {"PYTHONPATH": root, **{n: os.environ[n] for n in told}}}
    if joins:
        ray.init(address="auto", runtime_env=environment, log_to_driver=True)
        return
    LOG.info("starting a local Ray (about 10 seconds)")
    ray.init(
        address="local",  # never join a cluster of another user on this machine
        num_cpus=num_cpus or max(4, os.cpu_count() or 4),
        include_dashboard=False,
        runtime_env=environment,
        object_store_memory=512 * 1024 * 1024,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


def joins_a_cluster() -> bool:
    """Whether `connect` joins a cluster that outlives this process."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"))


def quiet() -> None:
    """Let Ray Data and Ray Train of this process log warnings only, and no bars but on a terminal.

    A driver whose worker logs a lot may print the rest of it after its own last words.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.enable_progress_bars and sys.stderr.isatty()
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Every execution would warn that it shows no bar.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)

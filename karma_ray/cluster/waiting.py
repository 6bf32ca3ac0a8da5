"""Telling the person at the driver what the cluster waits for, instead of waiting in silence."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get

LOG = logging.getLogger(__name__)

POLL_S = 2.0
REPEAT_S = 60.0
"""Time between two lines about the same demand."""


def topic_of(purpose: str) -> str:
    """Return the key under which workers of this driver leave a sentence for it."""
    return f"karma_ray/{ray.get_runtime_context().get_job_id()}/{purpose}"


def need_of(cpus: float, gpus: float) -> dict[str, float]:
    """Return what to tell of a process that needs CPUs and perhaps GPUs: the scarcer kind."""
    return {"GPU": gpus} if gpus else {"CPU": cpus}


@contextmanager
def telling(purpose: str, need: Mapping[str, float], workers: int) -> Iterator[None]:
    """While inside, log what `workers` that each need `need` still wait for, and what they say.

    A demand that is placed within seconds is not mentioned; another is mentioned once a minute.
    """
    stop = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(purpose, need, workers, stop), name="waiting", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=2 * POLL_S)


def pending(name: str) -> float:
    """Return how much of a resource is asked for in the whole cluster and has no place yet."""
    state: Any = get_cluster_resource_state(GcsClient(ray.get_runtime_context().gcs_address))
    single = sum(
        entry.request.resources_bundle.get(name, 0.0) * entry.count
        for entry in state.pending_resource_requests
    )
    groups = sum(
        request.resources_bundle.get(name, 0.0)
        for group in state.pending_gang_resource_requests
        for request in group.requests
    )
    return float(single + groups)


def _watch(purpose: str, need: Mapping[str, float], workers: int, stop: threading.Event) -> None:
    topic = topic_of(purpose)
    (name,) = need
    most, before, next_line = need[name] * workers, 0.0, 0.0
    while not stop.wait(POLL_S):
        try:
            _listen(purpose, topic)
            lacking = min(most, pending(name))
        except Exception as error:  # the cluster is busy or going down: the work itself will say so
            LOG.debug("%s: %s", purpose, error)
            continue
        if lacking and before and time.monotonic() >= next_line:
            LOG.info("%s: waiting for %s", purpose, _waited_for(name, lacking))
            next_line = time.monotonic() + REPEAT_S
        before = lacking
    with suppress(Exception):  # what was said since the last look
        _listen(purpose, topic)


def _listen(purpose: str, topic: str) -> None:
    """Log what a worker has left under `topic`."""
    if heard := _internal_kv_get(topic):
        LOG.warning("%s: %s", purpose, heard.decode())
        _internal_kv_del(topic)


def _waited_for(name: str, amount: float) -> str:
    up = ray.cluster_resources().get(name, 0.0)
    free = ray.available_resources().get(name, 0.0)
    whole = math.ceil(amount)  # workers may each need a part of one
    plural = "" if whole == 1 else "s"
    return f"{whole} {name}{plural}: {up:g} in the cluster, {free:g} of them free"

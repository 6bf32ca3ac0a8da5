"""Preparation on Ray: a task per part of the log, and then one per partition of users.

What tasks share, such as the catalogue's ids, is put into the object store once and mapped by
every process of a node. Rows are exchanged through files of the work folder, so that no process
and no object store ever holds the log, and a task whose worker died is simply run again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import ray

from karma_ray.cluster.elsewhere import own_errors
from karma_ray.cluster.session import connect
from karma_ray.data.config import PrepareConfig
from karma_ray.data.prepared import PreparedData
from karma_ray.data.tasks import Task, run_here
from karma_ray.runs import preparation

IN_FLIGHT = 1_000
"""Tasks that are submitted at the same time, which bounds what the driver keeps of them."""
_END_SECONDS = 30
"""How long tasks that were cancelled are waited for."""


def ensure_prepared(data_uri: str, config: PrepareConfig) -> PreparedData:
    """Call `karma_ray.runs.preparation.ensure_prepared` on Ray."""
    return preparation.ensure_prepared(data_uri, config, run_on_ray)


def prepare(
    data_uri: str, config: PrepareConfig, out: str | None = None, since: str | None = None,
    forget: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Call `karma_ray.runs.preparation.prepare` on Ray."""
    return preparation.prepare(data_uri, config, out, run_on_ray, since=since, forget=forget)


def run_on_ray(task: Task, inputs: Sequence[Any], small: bool) -> Iterable[None]:
    """Run every task on any node, or in this process when the log is small."""
    if small or not inputs:
        yield from run_here(task, inputs)
        return
    connect()
    shared, call = [ray.put(task)], ray.remote(_call)
    left = iter(inputs)
    running = [call.remote(shared, part) for part in islice(left, IN_FLIGHT)]
    try:
        while running:
            (done,), running = ray.wait(running, num_returns=1)
            with own_errors():
                ray.get(done)
            yield
            running += [call.remote(shared, part) for part in islice(left, 1)]
    finally:
        for each in running:
            ray.cancel(each)
        if running:  # none may write into a folder that the caller removes
            ray.wait(running, num_returns=len(running), timeout=_END_SECONDS, fetch_local=False)


def _call(shared: list[ray.ObjectRef], part: Any) -> None:
    """Run as a task on a node, on the one core that it is granted."""
    os.environ.setdefault("POLARS_MAX_THREADS", "1")  # before the task's modules import Polars
    task: Task = ray.get(shared[0])
    task(part)

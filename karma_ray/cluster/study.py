"""A study on Ray: its trials and first stages are tasks, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import ray

from karma_ray.cluster.accelerators import trial_resources
from karma_ray.cluster.executor import ON_RAY
from karma_ray.cluster.session import connect
from karma_ray.cluster.waiting import need_of, telling
from karma_ray.studies.machine import trials_in_memory


class RayMachine:
    """Runs the functions of a study as tasks of the cluster of this process."""

    executor = ON_RAY

    def __init__(self) -> None:
        self._telling: ExitStack | None = None  # from the first task until `stop`

    def open(self) -> None:
        """Join the cluster, or start a local one."""
        connect()

    def possible_trials(self) -> int:
        """Return as many as the cores and the memory of this machine allow."""
        return trials_in_memory()

    def start(self, function: Callable[..., Any], arguments: Sequence[Any], slots: int) -> Any:
        """Start `function(*arguments)` in a process that ends with it."""
        cpus, gpus = trial_resources(slots)
        if self._telling is None:
            self._telling = ExitStack()
            self._telling.enter_context(telling("trials", need_of(cpus, gpus), slots))
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=0)(_call)
        return remote.options(name=function.__name__).remote(function, *arguments)

    def ended(self, tasks: Sequence[Any], patience: float) -> list[Any]:
        """Return tasks that have ended."""
        return list(ray.wait(list(tasks), timeout=patience)[0])

    def result(self, task: Any) -> Any:
        """Return what the function returned, or raise what it raised."""
        return ray.get(task)

    def stop(self, tasks: Sequence[Any]) -> list[Any]:
        """End the processes of the tasks at once."""
        for task in tasks:
            ray.cancel(task, force=True)
        if self._telling is not None:
            self._telling.close()
            self._telling = None
        return []


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run as a task; a bar of its process could appear after the last words of the driver."""
    from karma_ray.training.loop import without_bars

    with without_bars():
        return function(*arguments)

"""The machine that computes a study: what the study asks of Ray, or of this process alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from karma_ray.runs.executor import Executor

TRIAL_GIB = 4.0
"""Memory in GiB that a trial of a usual size needs at most."""

Task = Any
"""A function that was started; hashable."""


class Machine(Protocol):
    """Runs functions in processes of their own, several at a time."""

    executor: Executor
    """What trials and first stages compute with."""

    def open(self) -> None:
        """Get ready; called once, before anything else."""

    def possible_trials(self) -> int:
        """Return how many trials run at a time unless the caller says so."""

    def start(self, function: Callable[..., Any], arguments: Sequence[Any], slots: int) -> Task:
        """Start `function(*arguments)` with one of `slots` equal shares of the machine.

        Its process is its own, so that its peak memory is that of one trial.
        """

    def ended(self, tasks: Sequence[Task], patience: float) -> list[Task]:
        """Return tasks that have ended, as soon as there are any or `patience` seconds are over."""

    def result(self, task: Task) -> Any:
        """Return what the function of an ended task returned, or raise why it did not."""

    def stop(self, tasks: Sequence[Task]) -> list[Task]:
        """Stop tasks; returns those that have a result nevertheless."""


def trials_in_memory() -> int:
    """Return how many trials run at a time: one per core, within the available memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory / TRIAL_GIB)))

"""A study on this machine alone: every trial is a child of this process, without Ray.

A child that is told to stop writes a checkpoint first, if it trains; so does one whose parent is
gone. On a machine with a GPU one trial runs at a time.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, cast

import torch

from karma_ray.errors import KarmaRayError
from karma_ray.runs.executor import HERE
from karma_ray.studies.child import work
from karma_ray.studies.machine import trials_in_memory

LOG = logging.getLogger(__name__)
GRACE_SECONDS = 60.0
"""How long a child may take to finish its step and to write its checkpoint."""


@dataclass(eq=False)
class _Child:
    process: SpawnProcess
    pipe: Connection
    found: Any = None
    reason: str | None = None
    """Why there is no result."""
    is_over: bool = False

    def receive(self) -> None:
        """Take the answer of a child that has sent one or has ended."""
        if self.is_over:
            return
        self.is_over = True
        try:
            self.found, self.reason = self.pipe.recv()
        except (EOFError, OSError):  # ended before an answer, or in the midst of one
            self.process.join()
            self.reason = f"its process ended with exit code {self.process.exitcode}"
        self.pipe.close()
        self.process.join()


class ThisMachine:
    """Runs the functions of a study in children of this process."""

    executor = HERE

    def open(self) -> None:
        """Do nothing."""

    def possible_trials(self) -> int:
        """Return 1 with a GPU, otherwise as many as the cores and the memory allow."""
        return 1 if torch.cuda.is_available() else trials_in_memory()

    def start(self, function: Callable[..., Any], arguments: Sequence[Any], slots: int) -> _Child:
        """Start `function(*arguments)` in a child, with its share of the cores as threads."""
        threads = max(1, (os.cpu_count() or 1) // slots)
        # Spawned, as a forked child could not use the GPU.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(theirs, threads, function, tuple(arguments)))
        process.start()
        theirs.close()  # so that the end of the child closes the pipe
        return _Child(process, ours)

    def ended(self, tasks: Sequence[_Child], patience: float) -> list[_Child]:
        """Return children that have sent an answer or have ended."""
        ready = cast(list[Connection], wait([task.pipe for task in tasks], timeout=patience))
        return [task for task in tasks if task.pipe in ready]

    def result(self, task: _Child) -> Any:
        """Return what the function returned; raises KarmaRayError with the reason if it failed."""
        task.receive()
        if task.reason is not None:
            raise KarmaRayError(task.reason)
        return task.found

    def stop(self, tasks: Sequence[_Child]) -> list[_Child]:
        """Let the children write their checkpoints and end, within GRACE_SECONDS."""
        if tasks:
            LOG.info("stopping %d running process(es)", len(tasks))
        for task in tasks:
            task.process.terminate()
        until = time.monotonic() + GRACE_SECONDS
        for task in tasks:
            if not self.ended([task], max(0.0, until - time.monotonic())):
                task.process.kill()
            task.receive()
        return [task for task in tasks if task.reason is None]

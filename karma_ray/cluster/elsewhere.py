"""A function that the cluster computes for the driver, as if it ran in the driver's process."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from io import TextIOBase
from queue import SimpleQueue

import ray
from ray.exceptions import RayError, RayTaskError

from karma_ray.cluster.session import connect, joins_a_cluster
from karma_ray.cluster.waiting import need_of, telling
from karma_ray.errors import KarmaRayError

LOG = logging.getLogger(__name__)
RETRIES = 2
"""How often a function is called again whose machine was lost."""

Told = logging.LogRecord | str
"""A line of the log, or a text for stderr."""


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise what a task raised as it was, an error of this package without any traceback."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, KarmaRayError):
            raise error.cause from None  # its message is all that the user needs
        raise error.cause from error


def run_elsewhere(purpose: str, function: Callable[[], object], cpus: float, gpus: float) -> None:
    """Call `function` in a process of its own that has these resources of the cluster.

    What it logs and draws on stderr appears here while it runs, and relative paths are those of
    this process. Raises what it raised, and KarmaRayError when the machines on which it ran were
    lost.
    """
    import torch  # here, as the tasks of other modules need none

    connect()
    # A local Ray does nothing else meanwhile, so the process computes as this one would.
    threads = max(1, int(cpus)) if joins_a_cluster() else torch.get_num_threads()
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=0)(_telling)
    with telling(purpose, need_of(cpus, gpus), 1), own_errors():
        for left in range(RETRIES, -1, -1):
            try:
                for told in remote.remote(function, os.getcwd(), threads, sys.stderr.isatty()):
                    _show(ray.get(told))
                return
            except RayTaskError:
                raise
            except RayError as lost:  # not by Ray, because what is told differs in number
                why = type(lost).__name__
                if not left:
                    raise KarmaRayError(f"{purpose}: its process was lost, {why}") from lost
                LOG.warning("%s: its process was lost, %s; it starts again", purpose, why)


def _show(told: Told) -> None:
    if isinstance(told, str):
        sys.stderr.write(told)
        sys.stderr.flush()
    elif (logger := logging.getLogger(told.name)).isEnabledFor(told.levelno):
        logger.handle(told)


class _Stderr(TextIOBase):
    """Puts what is written into a queue."""

    def __init__(self, told: SimpleQueue[Told | None], terminal: bool) -> None:
        self._told, self._terminal = told, terminal

    def write(self, text: str) -> int:
        self._told.put(text)
        return len(text)

    def isatty(self) -> bool:
        return self._terminal


def _telling(
    function: Callable[[], object], folder: str, threads: int, terminal: bool
) -> Iterator[Told]:
    """Run as a task that yields what `function` tells as soon as it does."""
    import torch

    told: SimpleQueue[Told | None] = SimpleQueue()
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(logging.handlers.QueueHandler(told))
    torch.set_num_threads(threads)
    if os.path.isdir(folder):
        os.chdir(folder)
    with ThreadPoolExecutor(1) as pool, redirect_stderr(_Stderr(told, terminal)):
        running = pool.submit(function)
        running.add_done_callback(lambda _: told.put(None))
        while (each := told.get()) is not None:
            yield each
        running.result()

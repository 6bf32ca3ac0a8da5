"""Stopping a run by a signal: at once, or, where a stage trains, with a checkpoint.

Signals belong to the process, so what they ask for is kept for the process too. A process that
does not call `stop_on_signals` ends as Python ends it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class _State:
    number: int = 0
    """The signal that came, or 0."""
    deferred: bool = False
    """Whether a stage trains, which looks at `is_requested` after every step."""


_STATE = _State()


def stop_on_signals() -> None:
    """Let SIGTERM and SIGINT stop this process, in the way that this module describes."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _receive)


def forget() -> None:
    """Take back what a signal asked for."""
    _STATE.number = 0


def is_requested() -> bool:
    """Whether the stage that trains should write a checkpoint and call `stop`."""
    return _STATE.number > 0


def stop() -> None:
    """End the process as the signal asks; raises SystemExit."""
    sys.exit(128 + _STATE.number)


@contextmanager
def deferred() -> Iterator[None]:
    """Leave the end of the process to the code inside; what it does not stop, stops after it."""
    _STATE.deferred = True
    try:
        yield
    finally:
        _STATE.deferred = False
    if is_requested():
        stop()


def _receive(number: int, _: object) -> None:
    _STATE.number = number
    if not _STATE.deferred:
        stop()

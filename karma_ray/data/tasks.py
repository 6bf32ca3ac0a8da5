"""Work that is divided into tasks, which leave their results in files.

Tasks run one after another in this process, or on Ray (cluster/sharding.py); what they write is
the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Task = Callable[[Any], None]
"""Does one part of the work, and leaves its result in the work folder."""

RunTasks = Callable[[Task, Sequence[Any], bool], Iterable[None]]
"""(task, inputs, whether the log is small) -> None for each input when its task is done."""


def run_here(task: Task, inputs: Sequence[Any], small: bool = True) -> Iterable[None]:
    """Run one task after another in this process."""
    return map(task, inputs)

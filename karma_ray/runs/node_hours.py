"""How many hours of which machines were up while a run, search or study ran: node_hours.json.

A cluster's machines come and go, so they are counted again and again while the run lasts, and a
run that is continued adds to what it has used before. Prices are not known here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from karma_ray.artifacts import RunFolder, exists, read_json, write_json
from karma_ray.errors import InputError
from karma_ray.training.checkpoints.outage import reason

LOG = logging.getLogger(__name__)

Count = Callable[[], Mapping[str, int]]
"""Returns how many machines of each kind are up now."""
PERIOD_S = 30.0
"""Time between two counts."""
SAVE_EVERY = 4
"""Counts between two writes of the file, which a job that is stopped leaves behind."""


def this_machine() -> dict[str, int]:
    """Return the count of a run without a cluster."""
    return {"this machine": 1}


def read_hours(run: str) -> dict[str, float]:
    """Return the hours by kind of machine that a run has noted so far; empty if it has none."""
    uri = RunFolder(run).path("node_hours.json")
    return dict(read_json(uri)["hours"]) if exists(uri) else {}


class NodeHours:
    """Counts machines from entering to leaving; no failure here ends the run."""

    def __init__(self, run: str, count: Count, period: float = PERIOD_S) -> None:
        self._run, self._count, self._period = run, count, period
        self._hours: dict[str, float] = {}
        self._last, self._up = time.monotonic(), dict[str, int]()
        self._done = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._watch, name="node hours", daemon=True)

    def __enter__(self) -> NodeHours:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join(timeout=self._period)
        if not isinstance(error, InputError):  # nothing ran, and the folder may be another run's
            self._add()
            self._save()

    def _watch(self) -> None:
        counts = 0
        while not self._done.wait(self._period):
            self._add()
            counts += 1
            if counts % SAVE_EVERY == 0:
                self._save()

    def _add(self) -> None:
        """Add the time since the last count for the machines that are up now."""
        now = time.monotonic()
        try:
            up = dict(self._count())
        except Exception as error:  # the cluster is busy or going down: as it was before
            LOG.debug("machines cannot be counted: %s", reason(error))
            up = self._up
        for kind, number in up.items():
            self._hours[kind] = self._hours.get(kind, 0.0) + number * (now - self._last) / 3600
        self._last, self._up = now, up

    def _save(self) -> None:
        try:
            hours = read_hours(self._run)
            for kind, added in self._hours.items():
                hours[kind] = round(hours.get(kind, 0.0) + added, 5)
            write_json({"hours": hours}, RunFolder(self._run).path("node_hours.json"))
            self._hours.clear()
        except Exception as error:
            if not self._warned:
                LOG.warning("node hours cannot be written yet: %s", reason(error))
            self._warned = True

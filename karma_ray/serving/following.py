"""A service follows the pointer of a live folder: it loads what was published beside what answers.

All of it happens in a thread of its own, so that requests are answered meanwhile; the exchange is
one assignment. Engines that are live or were live just before stay in memory, so that a rollback is
as quick as the assignment; at the next publication the older ones are freed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from karma_ray.errors import SkewError
from karma_ray.ranking.load import load_ranker
from karma_ray.retrieval.blended import with_channels
from karma_ray.retrieval.requests import Request
from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving.arms import Arm, Arms
from karma_ray.serving.engine import Engine, RecallCall
from karma_ray.serving.live import Live, LiveRun, live_text, parse_live, usable_folder
from karma_ray.serving.ranking import ServedRanker, check_ranker

if TYPE_CHECKING:
    from karma_ray.artifacts import RunFolder
    from karma_ray.serving.measures import Measures

LOG = logging.getLogger(__name__)
POLL_S = 1.0
"""Seconds between two looks at the pointer."""
MAX_RETRY_S = 60.0
"""Longest wait before something that could not be loaded is tried again."""


def engine_of(
    folder: RunFolder, cache_bytes: int, precision: str = "float32", *,
    ranker: str | None = None, channels: str = "auto",
) -> Engine:  # fmt: skip
    """Load a finished run with the lists that answer recall (`with_channels`).

    `ranker` is the run of a CTR model that stands beside it. Raises InputError when they do not
    fit, SkewError or KarmaRayError.
    """
    if ranker is not None:
        check_ranker(ranker, folder)  # fails before minutes of loading
    retriever = with_channels(Retriever.load(folder), folder, channels)
    rates = None
    if ranker is not None:
        rates = ServedRanker(load_ranker(ranker, retriever.device), retriever)
    return Engine(retriever, cache_bytes, precision, folder.root, rates)


def load_engine(
    arm: LiveRun, cache_bytes: int, precision: str = "float32", *,
    ranker: str | None = None, channels: str = "auto",
) -> Engine:  # fmt: skip
    """Load what an arm names, and answer a request with it, so that the first user need not wait.

    Raises SkewError if the run holds another model than was published, or KarmaRayError.
    """
    folder = usable_folder(arm)
    engine = engine_of(folder, cache_bytes, precision, ranker=ranker, channels=channels)
    if engine.version != arm.version:
        if engine.version["model_version"] != arm.model_version:
            raise SkewError(
                f"{arm.run} holds the model {engine.version['model_version']}, but "
                f"{arm.model_version} was published; publish the run again"
            )
        LOG.warning("%s: what was published is gone; its newest index serves", arm.run)
    answer = engine.answer([RecallCall(Request(None, []), 1)])[0]
    if isinstance(answer, Exception):
        raise answer
    return engine


class Follower:
    """Looks at a pointer and lets `swap` take what it names."""

    def __init__(
        self, folder: str, load: Callable[[LiveRun], Engine], poll_s: float = POLL_S
    ) -> None:
        """Load what is live now; raises InputError, SkewError or KarmaRayError."""
        self._folder, self._load, self._poll_s = folder, load, poll_s
        self._engines: dict[str, Engine] = {}
        self._applied = live_text(folder)
        self._failed: str | None = None
        self._retry_at, self._wait_s = 0.0, poll_s
        self.live = parse_live(self._applied, folder)
        self.arms = self._arms(self.live)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, swap: Callable[[Arms], object], measures: Measures) -> None:
        """Follow the pointer until `stop`."""

        def follow() -> None:
            while not self._stop.wait(self._poll_s):
                self.look(swap, measures)

        self._thread = threading.Thread(target=follow, name="follower", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what it is loading is dropped."""
        self._stop.set()

    def look(self, swap: Callable[[Arms], object], measures: Measures) -> None:
        """Look once. Whatever cannot be read or loaded is logged, and what answers goes on."""
        text = ""
        try:
            text = live_text(self._folder)
            if text == self._applied or (
                text == self._failed and time.monotonic() < self._retry_at
            ):
                return
            live = parse_live(text, self._folder)
            arms = self._arms(live)
            if self._stop.is_set():
                return
            swap(arms)
        except Exception as error:  # a store, a file or a model may fail in any way
            if not self._is_too_early(text):
                self._note_failure(text, error)
                measures.swaps.labels("failed").inc()
            return
        self.live, self.arms, self._applied = live, arms, text
        self._failed, self._wait_s = None, self._poll_s
        keys = {arm.engine_key for arm in (*live.arms, *live.previous_arms)}
        self._engines = {key: engine for key, engine in self._engines.items() if key in keys}
        measures.swaps.labels("done").inc()
        LOG.info("now live: %s", [f"{arm.arm}: {arm.run}" for arm in live.arms])

    def _arms(self, live: Live) -> Arms:
        found = []
        for arm in live.arms:
            engine = self._engines.get(arm.engine_key) or self._load(arm)
            self._engines[arm.engine_key] = engine
            found.append(Arm(arm.arm, engine, arm.share))
        return Arms(found, live.split)

    def _is_too_early(self, text: str) -> bool:
        """Whether the same failed a moment ago."""
        return text == self._failed and time.monotonic() < self._retry_at

    def _note_failure(self, text: str, error: Exception) -> None:
        self._wait_s = min(MAX_RETRY_S, 2 * self._wait_s) if text == self._failed else self._poll_s
        self._failed, self._retry_at = text, time.monotonic() + self._wait_s
        LOG.error("%s: cannot follow, what answers goes on: %s", self._folder, error)

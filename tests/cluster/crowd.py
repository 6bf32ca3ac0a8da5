"""Clients that ask an endpoint without pause, compare each answer with what it must be, and count.

An answer names the model and the index that gave it. It is *mixed* if no known run has this pair,
*wrong* if it holds other items than that run finds, and a request has *failed* if the client, with
its retries, was not answered at all.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

from karma_ray.artifacts import join, read_manifest
from karma_ray.retrieval.requests import HistoryItem
from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving.client import Click, Client, EndpointError

PATIENCE_S = 300.0
"""How long a crowd waits for an endpoint to come back: a lost replica loads its model again."""
PAUSE_S = 0.2
"""Seconds for which a client whose request failed asks nothing, as a dead port refuses at once."""
QUESTIONS = [
    ("red mug", [Click(f"i{(7 * n + m) % 40}", "lamp") for m in range(n % 5)], 3 + n % 4)
    for n in range(20)
]

Version = tuple[str, str]
Known = Mapping[Version, list[list[str]]]


def known_answers(*runs: str) -> Known:
    """The items of each question, by the versions of the run that finds them."""
    found = {}
    for run in runs:
        retriever, answers = Retriever.load(run), []
        for query, history, k in QUESTIONS:
            clicks = [HistoryItem(click.item_id, click.query) for click in history]
            answers.append([i.item_id for i in retriever.recall(query, clicks, k).items])
        model, index = (read_manifest(join(run, part)) for part in ("bundle", "index"))
        found[model["content_hash"], index["content_hash"]] = answers
    return found


@dataclass(frozen=True)
class Counts:
    """What happened to the requests of a crowd."""

    asked: int
    repeated: int
    """Requests that were sent once more."""
    failed: int
    mixed: int
    wrong: int
    by_version: Mapping[Version, int]
    statuses: frozenset[int | None]
    """What failed requests were answered with; None is a lost or refused connection."""
    silent_s: float
    """Longest time without an answer."""

    def row(self, name: str) -> str:
        """A row of the table in docs/operations.md."""
        numbers = f"{self.asked:,} | {self.repeated} | {self.failed} | {self.mixed} | {self.wrong}"
        return f"| {name} | {numbers} | {self.silent_s:.1f} |"


class _Counting(httpx.HTTPTransport):
    """Counts what is sent."""

    sent = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.sent += 1
        return super().handle_request(request)


class Crowd:
    """So many clients, each in a thread of its own; use it as a context."""

    def __init__(self, url: str, known: Known, clients: int = 8, num_retries: int = 1) -> None:
        self._url, self._known, self._num_retries = url, known, num_retries
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(clients)]
        self._begin()

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def counts(self) -> Counts:
        """What has happened since the last call, or the beginning."""
        with self._lock:
            self._answered(0)
            count = self._count
            found = Counts(
                count["asked"], count["sent"] - count["asked"], count["failed"], count["mixed"],
                count["wrong"], self._by_version, frozenset(self._statuses), self._silent_s,
            )  # fmt: skip
            self._begin()
            return found

    def wait_for(self, more: int) -> None:
        """Return when `more` further requests were answered."""
        with self._lock:
            until, limit = self._num_answered + more, time.monotonic() + PATIENCE_S
        while self._num_answered < until:
            assert time.monotonic() < limit, "the endpoint did not come back"
            time.sleep(0.05)

    _num_answered = 0

    def _begin(self) -> None:
        self._count: Counter[str] = Counter()
        self._by_version: Counter[Version] = Counter()
        self._statuses: set[int | None] = set()
        self._last, self._silent_s = time.monotonic(), 0.0

    def _answered(self, number: int) -> None:
        now = time.monotonic()
        self._silent_s = max(self._silent_s, now - self._last)
        self._last, self._num_answered = now, self._num_answered + number

    def _ask(self, place: int) -> None:
        line = _Counting()
        with Client(
            self._url, timeout_s=60, num_retries=self._num_retries, transport=line
        ) as client:
            while not self._stop.is_set():
                place, before = (place + 1) % len(QUESTIONS), line.sent
                query, history, k = QUESTIONS[place]
                found: Version | EndpointError
                try:
                    answer = client.recall(query, history, k=k)
                    found = answer["model_version"], answer["index_version"]
                    ids = [item["item_id"] for item in answer["items"]]
                except EndpointError as error:
                    found, ids = error, []
                with self._lock:
                    self._count.update(asked=1, sent=line.sent - before)
                    self._note(found, ids, place)
                if isinstance(found, EndpointError):
                    self._stop.wait(PAUSE_S)

    def _note(self, found: Version | EndpointError, ids: list[str], place: int) -> None:
        if isinstance(found, EndpointError):
            self._count["failed"] += 1
            self._statuses.add(found.status)
            return
        self._answered(1)
        self._by_version[found] += 1
        if found not in self._known:
            self._count["mixed"] += 1
        elif ids != self._known[found][place]:
            self._count["wrong"] += 1

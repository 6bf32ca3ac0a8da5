"""Calls of many requests, answered together by one compute thread.

Nobody waits for a batch to fill: the thread takes what is there when it becomes free, up to a
stated weight. Under light load a call is alone, under full load batches form by themselves.

Under overload calls are refused, so that the accepted ones do not wait long. What a call waits for
is the work in flight, waiting or being computed, divided by what the thread computes in a second.
It may wait for as long as IN_FLIGHT usual calls take; the thread's speed is in both and cancels, so
that weights are compared.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from karma_ray.errors import KarmaRayError

ALWAYS_TAKEN = 16
"""Calls in flight, whatever their weight, up to which a further one is taken."""
IN_FLIGHT = 32
"""Calls of the usual weight that may be in flight: twice as many as sixteen clients keep there, so
that an accepted call takes at most twice the time that it takes among sixteen clients."""
RECENT = 100
"""Calls over which the usual weight is averaged."""

Call = TypeVar("Call")
Answer = TypeVar("Answer")


class Overloaded(KarmaRayError):
    """Too many calls wait, or one waited until its deadline."""


@dataclass
class _Waiting(Generic[Call]):
    call: Call
    weight: int
    deadline: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


class Batcher(Generic[Call, Answer]):
    """Hands calls to a compute thread. `submit` belongs to the event loop, `work` to the thread."""

    def __init__(
        self,
        work: Callable[[Sequence[Call]], Sequence[Answer | Exception]],
        max_weight: int,
        max_waiting: int | None = None,
        observe: Callable[[int, float], None] | None = None,
    ) -> None:
        """`work` answers every call of a batch, with an exception for one that failed.

        A batch holds one call or calls of at most `max_weight` together. `max_waiting` calls may
        wait; if it is None, what may be in flight depends on its weight. `observe` is told the size
        of each batch and its seconds.
        """
        self.max_weight, self.max_waiting = max_weight, max_waiting
        self._in_flight = self._weight = 0  # calls, and their weights together
        self._usual, self._seen = 0.0, 0
        self._work, self._observe = work, observe
        self._waiting: deque[_Waiting[Call]] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Calls that no batch has taken yet."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether a further call would be refused."""
        if self.max_waiting is not None:
            return len(self._waiting) >= self.max_waiting
        return self._in_flight >= ALWAYS_TAKEN and self._weight >= IN_FLIGHT * self._usual

    async def submit(self, call: Call, weight: int, within_s: float) -> Answer:
        """Return the answer to a call; raises Overloaded, or what `work` answered.

        A call that no batch has taken after `within_s` seconds is given up.
        """
        if self.is_full or not self._open:
            raise Overloaded(f"{len(self._waiting)} requests wait already")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        entry = _Waiting(call, weight, time.monotonic() + within_s, loop, future)
        self._seen = min(self._seen + 1, RECENT)
        self._usual += (weight - self._usual) / self._seen
        with self._changed:
            self._in_flight, self._weight = self._in_flight + 1, self._weight + weight
            self._waiting.append(entry)
            self._changed.notify()
        return await future

    def close(self, within_s: float = 10.0) -> None:
        """Answer what waits, then end the thread."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join(within_s)

    def _run(self) -> None:
        while batch := self._next():
            now = time.monotonic()
            late = [entry for entry in batch if entry.deadline < now or entry.future.cancelled()]
            batch = [entry for entry in batch if entry not in late] if late else batch
            error = Overloaded("the request waited too long")
            answers: list[Any] = [error] * len(late)
            if batch:
                answers += self._answered([entry.call for entry in batch])
                if self._observe is not None:
                    self._observe(len(batch), time.monotonic() - now)
            done = [*late, *batch]
            with self._changed:
                self._in_flight -= len(done)
                self._weight -= sum(entry.weight for entry in done)
            _deliver(done, answers)

    def _answered(self, calls: Sequence[Call]) -> Sequence[Any]:
        try:
            return self._work(calls)
        except Exception as error:
            return [error] * len(calls)

    def _next(self) -> list[_Waiting[Call]]:
        with self._changed:
            while not self._waiting:
                if not self._open:
                    return []
                self._changed.wait()
            batch = [self._waiting.popleft()]
            weight = batch[0].weight
            while self._waiting and weight + self._waiting[0].weight <= self.max_weight:
                batch.append(self._waiting.popleft())
                weight += batch[-1].weight
            return batch


def _deliver(batch: Sequence[_Waiting[Any]], answers: Sequence[Any]) -> None:
    """Wake every event loop once, whatever the size of the batch."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for entry, answer in zip(batch, answers, strict=True):
        loops.setdefault(entry.loop, []).append((entry.future, answer))
    for loop, results in loops.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_settle, results)


def _settle(results: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, answer in results:
        if future.done():
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

"""Calls form batches by themselves, in order, and none is lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from karma_ray.serving.batching import ALWAYS_TAKEN, IN_FLIGHT, RECENT, Batcher, Overloaded


class Work:
    """Doubles numbers, when the gate is open; notes the batches."""

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, calls: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(calls))
        self.entered.set()
        self.gate.wait(30)
        return [ValueError(str(n)) if n < 0 else 2 * n for n in calls]


async def behind_a_busy_thread(batcher: Batcher, work: Work) -> asyncio.Task:
    """Occupy the thread with the call 0, so that what follows waits together."""
    first = asyncio.ensure_future(batcher.submit(0, 1, 60))
    await asyncio.to_thread(work.entered.wait, 30)
    return first


def test_what_waits_is_computed_together_up_to_a_weight_and_in_order() -> None:
    work = Work()

    async def ask() -> list[int]:
        batcher: Batcher[int, int] = Batcher(work, max_weight=10, max_waiting=50)
        first = await behind_a_busy_thread(batcher, work)
        calls = [asyncio.ensure_future(batcher.submit(n, 4, 60)) for n in range(1, 6)]
        large = asyncio.ensure_future(batcher.submit(9, 99, 60))
        await asyncio.sleep(0)
        work.gate.set()
        found = await asyncio.gather(first, *calls, large)
        batcher.close()
        return found

    assert asyncio.run(ask()) == [0, 2, 4, 6, 8, 10, 18]
    assert work.batches == [[0], [1, 2], [3, 4], [5], [9]]


def test_an_error_belongs_to_its_call_alone() -> None:
    work = Work()
    work.gate.set()

    async def ask() -> None:
        batcher: Batcher[int, int] = Batcher(work, 10, 50)
        good, bad = await asyncio.gather(
            batcher.submit(3, 1, 60), batcher.submit(-1, 1, 60), return_exceptions=True
        )
        assert good == 6 and isinstance(bad, ValueError)
        batcher.close()

    asyncio.run(ask())


def test_a_failing_batch_does_not_end_the_thread() -> None:
    def work(calls: Sequence[int]) -> list[int | Exception]:
        if calls[0] == 0:
            raise RuntimeError("out of memory")
        return list(calls)

    async def ask() -> None:
        batcher: Batcher[int, int] = Batcher(work, 10, 50)
        with pytest.raises(RuntimeError, match="out of memory"):
            await batcher.submit(0, 1, 60)
        assert await batcher.submit(1, 1, 60) == 1
        batcher.close()
        with pytest.raises(Overloaded):
            await batcher.submit(1, 1, 60)

    asyncio.run(ask())


def test_too_many_calls_and_late_ones_are_given_up() -> None:
    work = Work()

    async def ask() -> None:
        batcher: Batcher[int, int] = Batcher(work, 10, max_waiting=3)
        first = await behind_a_busy_thread(batcher, work)
        late = asyncio.ensure_future(batcher.submit(1, 1, -1.0))
        cancelled, kept = (asyncio.ensure_future(batcher.submit(n, 1, 60)) for n in (2, 3))
        await asyncio.sleep(0)
        assert batcher.is_full and batcher.num_waiting == 3
        with pytest.raises(Overloaded, match="3 requests wait"):
            await batcher.submit(4, 1, 60)
        cancelled.cancel()
        await asyncio.sleep(0)
        work.gate.set()
        assert await first == 0 and await kept == 6
        with pytest.raises(Overloaded, match="too long"):
            await late
        batcher.close()

    asyncio.run(ask())
    assert work.batches == [[0], [3]]


@pytest.mark.parametrize(
    ("usual", "weight", "least", "most"),
    [(7, 7, IN_FLIGHT, IN_FLIGHT), (2, 200, ALWAYS_TAKEN, ALWAYS_TAKEN), (200, 20, 80, 300)],
    ids=["usual ones", "heavy ones", "light ones"],
)
def test_what_may_be_in_flight_depends_on_what_it_weighs(
    usual: int, weight: int, least: int, most: int
) -> None:
    work = Work()

    async def ask() -> int:
        batcher: Batcher[int, int] = Batcher(work, 10**6)
        work.gate.set()
        for _ in range(RECENT):
            await batcher.submit(1, usual, 60)
        work.gate.clear()
        work.entered.clear()
        first = await behind_a_busy_thread(batcher, work)  # what is computed counts too
        calls = []
        while not batcher.is_full:
            calls.append(asyncio.ensure_future(batcher.submit(1, weight, 60)))
            await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="requests wait already"):
            await batcher.submit(1, weight, 60)
        work.gate.set()
        assert await asyncio.gather(first, *calls) == [0, *[2] * len(calls)]
        assert not batcher.is_full
        batcher.close()
        return 1 + len(calls)

    assert least <= asyncio.run(ask()) <= most + 1  # the first of all weighs little

"""Training batches: rows are read in shuffled windows of the table and collated ahead of the step.

The windows are those of `training/order.py`. The caller chooses who reads them: this process
(`local_blocks`), or remote tasks that deliver the same rows in the same order. A resumed run
starts with the window of its next batch, so it reads no rows only to skip them. Memory holds a few
windows, whatever the size of the table.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from karma_ray.data.draws import hashed
from karma_ray.training.order import Order, Source, Window

ReadBlocks = Callable[[Order, Sequence[Window]], Iterator[pa.Table]]
"""Reads the rows of windows, in order, as blocks of any size."""

Collate = Callable[[pa.Table, np.ndarray], Any]
"""(rows, a key for the random draws of each row) -> a batch."""


@dataclass(frozen=True)
class WorkerContext:
    """What `TrainJob.make_batches` needs: the worker, its steps and a reader of rows."""

    rank: int
    num_workers: int
    start_step: int
    steps: int
    read_blocks: ReadBlocks


def ordered_batches(
    table: str,
    seed: int,
    batch_size: int,
    make_collator: Callable[[], Collate],
    context: WorkerContext,
) -> Iterator[Any]:
    """Return one worker's batches of the table at `table`, in the order given by `seed`."""
    order = Order(Source.scan(table), seed, batch_size, context.rank, context.num_workers)
    return stream_batches(
        order, make_collator, start_step=context.start_step, steps=context.steps,
        read_blocks=context.read_blocks,
    )  # fmt: skip


def stream_batches(
    order: Order,
    make_collator: Callable[[], Collate],
    *,
    start_step: int,
    steps: int,
    read_blocks: ReadBlocks,
    prefetch: int = 2,
) -> Iterator[Any]:
    """Yield this worker's collated batches of steps `start_step` to `steps`.

    `make_collator` is called once, here, so the worker opens the catalogue and tokens itself.
    The draws for a row depend on (seed, epoch, batch, its position in the global batch). A
    resumed stream therefore equals an uninterrupted one, for any number of workers. A thread
    collates `prefetch` batches ahead (0: no thread).
    """
    windows = order.windows(start_step, steps)
    blocks = read_blocks(order, windows)
    batches = _collated(order, windows, blocks, make_collator())
    return in_background(batches, prefetch) if prefetch else batches


def local_blocks(order: Order, windows: Sequence[Window]) -> Iterator[pa.Table]:
    """Read window after window in this process."""
    return (order.source.read(window) for window in windows)


def _collated(
    order: Order, windows: Sequence[Window], blocks: Iterator[pa.Table], collate: Collate
) -> Iterator[Any]:
    held: list[pa.Table] = []
    for window in windows:
        positions = np.arange(*window.positions)
        for batch in range(window.first_batch, window.first_batch + window.num_batches):
            rows, held = _take(held, blocks, window.batch_rows)
            yield collate(rows, hashed(order.seed, window.epoch, batch, positions))


def _take(
    held: list[pa.Table], blocks: Iterator[pa.Table], count: int
) -> tuple[pa.Table, list[pa.Table]]:
    """Return the next `count` rows, and the rest of the blocks held."""
    while sum(table.num_rows for table in held) < count:
        held = [*held, next(blocks)]
    table = pa.concat_tables(held) if len(held) > 1 else held[0]
    return table.slice(0, count), [table.slice(count)]


def in_background(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """Iterate in a thread, `depth` items ahead; errors reach the consumer."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:  # the consumer raises it again, whatever it is
            put((False, error))

    thread = threading.Thread(target=run, name="collate", daemon=True)
    thread.start()
    try:
        while True:
            more, value = ready.get()
            if more:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stopped.set()

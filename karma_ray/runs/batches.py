"""Training batches: shuffle windows of the table, read in order and collated a few ahead.

The windows are those of `training/order.py`. Who reads them is the caller's choice: this process
(`local_blocks`), or tasks elsewhere that hand over the same rows in the same order. Resuming
starts the list at the next batch, so no rows are read to be skipped, and only windows are ever in
memory, whatever the size of the table.
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
"""rows, and a key for the random draws of each -> a batch."""


@dataclass(frozen=True)
class WorkerContext:
    """What `TrainJob.make_batches` needs to know: which worker, from which step to which."""

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
    """A worker's batches of the table at `table`, in the order that `seed` gives."""
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

    `make_collator` is called once, here: catalogue and tokens are opened on the worker's node.
    A row's draws depend on (seed, epoch, batch, its position in the batch of all workers), so a
    resumed stream equals an uninterrupted one, on any number of workers. A thread collates
    `prefetch` batches ahead (0: none).
    """
    windows = tuple(order.windows(start_step, steps))
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
    """The next `count` rows, and what is left of the blocks held."""
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
        except BaseException as error:  # handed to the consumer, whatever it is
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

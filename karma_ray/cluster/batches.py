"""Training batches streamed from Ray Data, or read in this process in the very same order.

One Ray Data pipeline per worker covers the whole training: its input is the list of shuffle
windows of `training/order.py`, its map tasks read and shuffle them, the worker receives the rows
in order, a bounded number ahead. So

* a new epoch is the next window of a running stream and costs nothing (a Ray Dataset executed
  anew per epoch takes 1-2 s before its first batch),
* resuming starts the list at the next batch: no rows are read to be skipped,
* only windows are ever in memory, whatever the size of the table.

A global `random_shuffle` or `sort` per epoch would cost 5-25 s each (RAY.md section 3), and
`streaming_split` assigns blocks to whichever worker asks first.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from karma_ray.data.draws import hashed
from karma_ray.training.order import Order, Source, Window

Collate = Callable[[pa.Table, np.ndarray], Any]
"""rows, and a key for the random draws of each -> a batch."""


def stream_batches(
    order: Order,
    make_collator: Callable[[], Collate],
    *,
    start_step: int,
    steps: int,
    use_ray: bool,
    prefetch: int = 2,
) -> Iterator[Any]:
    """Yield this worker's collated batches of steps `start_step` to `steps`.

    `make_collator` is called once, here: catalogue and tokens are opened on the worker's node.
    A row's draws depend on (seed, epoch, batch, its position in the batch of all workers), so a
    resumed stream equals an uninterrupted one, on any number of workers. A thread collates
    `prefetch` batches ahead (0: none).
    """
    windows = tuple(order.windows(start_step, steps))
    blocks = ray_blocks(order, windows) if use_ray else local_blocks(order.source, windows)
    batches = _collated(order, windows, blocks, make_collator())
    return in_background(batches, prefetch) if prefetch else batches


def local_blocks(source: Source, windows: Sequence[Window]) -> Iterator[pa.Table]:
    """Read window after window in this process."""
    return (source.read(window) for window in windows)


def ray_blocks(order: Order, windows: Sequence[Window]) -> Iterator[pa.Table]:
    """Stream the rows of `windows`, in order, from Ray Data tasks."""
    import ray

    units = _group(windows, order.window_rows)
    source = order.source

    def read(table: pa.Table) -> Iterator[pa.Table]:
        for unit in table.column("id").to_pylist():
            for window in units[unit]:
                yield source.read(window)

    # From items, whose blocks are made here: the tasks behind `from_arrow` and `range` each want a
    # CPU, and wait for ever where the training workers hold them all.
    items = [{"id": unit} for unit in range(len(units))]
    dataset = ray.data.from_items(items, override_num_blocks=len(units))
    dataset = dataset.map_batches(
        read,
        batch_size=None,
        batch_format="pyarrow",
        # Reading is light; a reserved CPU could starve when training workers hold them all.
        num_cpus=0,
        concurrency=1,
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def _group(windows: Sequence[Window], rows: int) -> tuple[tuple[Window, ...], ...]:
    """Consecutive windows in units of about `rows` rows: a small table is not a task an epoch."""
    units: list[list[Window]] = []
    size = rows
    for window in windows:
        if size >= rows:
            units.append([])
            size = 0
        units[-1].append(window)
        size += window.rows_read
    return tuple(tuple(unit) for unit in units)


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

"""The rows of training batches, streamed from Ray Data.

A table that fits into one shuffle window is read by the worker itself, in milliseconds: Ray Data
would take seconds before the first step, and a process of its own. For a larger table each worker
has one Ray Data pipeline for the whole training. Its input is the list of shuffle windows of
`training/order.py`; its map tasks read and shuffle them, and the worker receives rows in order, a
bounded number ahead. A new epoch is just the next window of a running stream, whereas executing a
Ray Dataset again per epoch takes 1-2 s before the first batch.

A global `random_shuffle` or `sort` per epoch would cost 5-25 s each, and `streaming_split` assigns
blocks to the worker that asks first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from karma_ray.runs.batches import local_blocks
from karma_ray.training.order import Order, Window


def ray_blocks(order: Order, windows: Sequence[Window]) -> Iterator[pa.Table]:
    """Return the rows of `windows`, in order; those of a large table come from Ray Data tasks."""
    return local_blocks(order, windows) if order.is_small else _streamed(order, windows)


def _streamed(order: Order, windows: Sequence[Window]) -> Iterator[pa.Table]:
    import ray

    units = _group(windows, order.window_rows)
    source = order.source

    def read(table: pa.Table) -> Iterator[pa.Table]:
        for unit in table.column("id").to_pylist():
            for window in units[unit]:
                yield source.read(window)

    # Built from items, whose blocks are made here: the tasks of `from_arrow` and `range` each need
    # a CPU, and would wait for ever if the training workers hold all of them.
    items = [{"id": unit} for unit in range(len(units))]
    dataset = ray.data.from_items(items, override_num_blocks=len(units))
    dataset = dataset.map_batches(
        read,
        batch_size=None,
        batch_format="pyarrow",
        # Reading is cheap, and a reserved CPU may not be available beside training workers.
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=1),
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def _group(windows: Sequence[Window], rows: int) -> tuple[tuple[Window, ...], ...]:
    """Group consecutive windows into units of about `rows` rows, to avoid a task per epoch."""
    units: list[list[Window]] = []
    size = rows
    for window in windows:
        if size >= rows:
            units.append([])
            size = 0
        units[-1].append(window)
        size += window.rows_read
    return tuple(tuple(unit) for unit in units)

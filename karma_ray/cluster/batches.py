"""The rows of training batches, streamed from Ray Data.

One Ray Data pipeline per worker covers the whole training: its input is the list of shuffle
windows of `training/order.py`, its map tasks read and shuffle them, the worker receives the rows
in order, a bounded number ahead. A new epoch is the next window of a running stream and costs
nothing; a Ray Dataset executed anew per epoch takes 1-2 s before its first batch.

A global `random_shuffle` or `sort` per epoch would cost 5-25 s each, and `streaming_split` assigns
blocks to whichever worker asks first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from karma_ray.training.order import Order, Window


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

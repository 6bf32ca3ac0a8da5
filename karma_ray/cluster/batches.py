"""The rows of training batches, streamed from Ray Data.

A table that fits into one shuffle window is read by the worker itself, in milliseconds: Ray Data
would take seconds before the first step, and a process of its own. For a larger table each worker
has one Ray Data pipeline for the whole training. Its input are numbers of the shuffle windows of
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

MAX_UNITS = 1_024
"""Tasks that read the rows of a training, however long it is."""


def ray_blocks(order: Order, windows: Sequence[Window]) -> Iterator[pa.Table]:
    """Return the rows of `windows`, in order; those of a large table come from Ray Data tasks."""
    return local_blocks(order, windows) if order.is_small else _streamed(order, windows)


def _streamed(order: Order, windows: Sequence[Window]) -> Iterator[pa.Table]:
    import ray

    size = _unit_size(order, windows)

    def read(table: pa.Table) -> Iterator[pa.Table]:
        for first in table.column("first").to_pylist():
            for number in range(first, min(first + size, len(windows))):
                yield order.source.read(windows[number])

    # Built from items, whose blocks are made here: the tasks of `from_arrow` and `range` each need
    # a CPU, and would wait for ever if the training workers hold all of them.
    items = [{"first": first} for first in range(0, len(windows), size)]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
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


def _unit_size(order: Order, windows: Sequence[Window]) -> int:
    """Return how many consecutive windows a task reads: about `window_rows` rows, to avoid a task
    per epoch of a small table, and more if there would be more than MAX_UNITS tasks.

    A task yields window after window, so its memory does not grow with their number.
    """
    rows = max((window.rows_read for window in windows[:2]), default=1)
    return max(1, -(-order.window_rows // rows), -(-len(windows) // MAX_UNITS))

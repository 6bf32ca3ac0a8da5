"""The order of the training rows: a pure function of (seed, epoch), resumable at any step.

A *window* is what one read task turns into shuffled rows. Two regimes, chosen by size:

* A table of at most `window_rows` rows is one window: every epoch is one exact permutation of
  all rows, each worker reads the table and keeps its slice of every batch. The order does not
  depend on the number of workers at all; reading so little N times costs nothing.
* A larger table is dealt out: row groups are permuted, worker r owns the r-th N-th of their
  rows, and shuffles them window by window. Every row is read once per epoch in all (groups on a
  border twice) and memory is bounded by the window; the order depends on (seed, epoch, N).

The last batch of an epoch may be smaller; it is dropped when some worker would get no row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from karma_ray.artifacts import open_filesystem
from karma_ray.errors import InputError

WINDOW_ROWS = 16_384


@dataclass(frozen=True)
class RowGroup:
    """One row group of one Parquet file."""

    file: str
    index: int
    rows: int


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a row group."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Rows that are shuffled together, and the batches this worker makes of them."""

    epoch: int
    first_batch: int  # number within the epoch of the first batch of this window
    pieces: tuple[Piece, ...]
    key: tuple[int, ...]  # seed of the permutation
    batch_rows: tuple[int, ...]  # rows of each batch, before the share is taken
    share: tuple[int, int]  # (r, N): keep the r-th N-th of every batch
    skip: int = 0  # batches already consumed

    def slices(self) -> list[tuple[int, int]]:
        """This worker's rows of each batch, as bounds in the permuted window."""
        bounds, start = [], 0
        number, count = self.share
        for rows in self.batch_rows:
            bounds.append((start + rows * number // count, start + rows * (number + 1) // count))
            start += rows
        return bounds[self.skip :]


@dataclass(frozen=True)
class Source:
    """A Parquet folder and its row groups."""

    uri: str
    groups: tuple[RowGroup, ...]

    @classmethod
    def scan(cls, uri: str) -> Source:
        """Read the footers below `uri`; raises InputError when there is no row."""
        fs, path = open_filesystem(uri)
        files = sorted(fs.glob(f"{path}/**/*.parquet")) if fs.isdir(path) else [path]
        groups: list[RowGroup] = []
        for file in files:
            with fs.open(file, "rb") as source:
                footer = pq.read_metadata(source)
            rows = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
            groups += [RowGroup(file, i, count) for i, count in enumerate(rows) if count]
        if not groups:
            raise InputError("training data", uri, "holds no rows")
        return cls(uri, tuple(groups))

    @property
    def num_rows(self) -> int:
        return sum(group.rows for group in self.groups)

    def read(self, window: Window) -> pa.Table:
        """This worker's rows of a window, in the order of its batches."""
        fs, _ = open_filesystem(self.uri)
        parts = []
        for piece in window.pieces:
            group = self.groups[piece.group]
            with fs.open(group.file, "rb") as source:
                table = pq.ParquetFile(source).read_row_group(group.index)
            parts.append(table.slice(piece.start, piece.stop - piece.start))
        table = pa.concat_tables(parts).combine_chunks()
        order = np.random.default_rng(window.key).permutation(table.num_rows)
        chosen = [order[start:stop] for start, stop in window.slices()]
        return table.take(pa.array(np.concatenate(chosen)))


@dataclass(frozen=True)
class Order:
    """Which rows a worker gets, batch by batch, for the whole training."""

    source: Source
    seed: int
    batch_size: int
    rank: int = 0
    num_workers: int = 1
    window_rows: int = WINDOW_ROWS

    def __post_init__(self) -> None:
        if self.batch_size % self.num_workers:
            raise InputError(
                "training.batch_size",
                self.batch_size,
                f"must be a multiple of num_workers = {self.num_workers}",
            )
        if self.source.num_rows < self.num_workers:
            raise InputError("training data", self.source.num_rows, "rows for more workers")

    @property
    def _dealt(self) -> bool:
        return self.source.num_rows > self.window_rows

    @cached_property
    def _lane_batches(self) -> tuple[int, ...]:
        """Rows of every batch of an epoch, in this worker's lane (or of all workers)."""
        lanes = self.num_workers if self._dealt else 1
        size, total = self.batch_size // lanes, self.source.num_rows
        bounds = [total * lane // lanes for lane in range(lanes + 1)]
        lengths = [stop - start for start, stop in pairwise(bounds)]
        count = -(-max(lengths) // size)
        # The last batch stands only when every worker has a row in it.
        needed = 1 if self._dealt else self.num_workers
        if min(lengths) - (count - 1) * size < needed:
            count -= 1
        own = lengths[self.rank if self._dealt else 0]
        return tuple(min(size, own - batch * size) for batch in range(count))

    @property
    def batches_per_epoch(self) -> int:
        return len(self._lane_batches)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, batches of it consumed) before `step`."""
        return divmod(step, self.batches_per_epoch)

    def windows(self, start_step: int, steps: int) -> Iterator[Window]:
        """The windows of batches `start_step` to `steps`, across epochs."""
        epoch, skip = self.position(start_step)
        left = steps - start_step
        while left > 0:
            for window in self._epoch(epoch):
                count = len(window.batch_rows)
                if skip >= count:
                    skip -= count
                    continue
                taken = window.batch_rows[: skip + left]
                yield Window(
                    epoch, window.first_batch, window.pieces, window.key, taken, window.share, skip
                )
                left -= len(taken) - skip
                skip = 0
                if left <= 0:
                    return
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[Window]:
        groups = self.source.groups
        sizes = self._lane_batches
        if not self._dealt:
            pieces = tuple(Piece(i, 0, group.rows) for i, group in enumerate(groups))
            share = (self.rank, self.num_workers)
            yield Window(epoch, 0, pieces, (self.seed, epoch), sizes, share)
            return
        order = np.random.default_rng((self.seed, epoch)).permutation(len(groups))
        total = self.source.num_rows
        start = total * self.rank // self.num_workers
        per_window = max(1, self.window_rows // max(sizes))
        for first in range(0, len(sizes), per_window):
            taken = sizes[first : first + per_window]
            pieces = tuple(_pieces(groups, order, start, start + sum(taken)))
            key = (self.seed, epoch, self.rank, first)
            yield Window(epoch, first, pieces, key, taken, (0, 1))
            start += sum(taken)


def _pieces(
    groups: tuple[RowGroup, ...], order: np.ndarray, start: int, stop: int
) -> Iterator[Piece]:
    """Rows `start` to `stop` of the row groups concatenated in `order`."""
    before = 0
    for index in order:
        rows = groups[index].rows
        low, high = max(start - before, 0), min(stop - before, rows)
        if low < high:
            yield Piece(int(index), low, high)
        before += rows

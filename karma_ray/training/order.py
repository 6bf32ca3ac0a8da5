"""The order of the training rows: batch s of the training is a pure function of (seed, s).

It does not depend on the number of workers: a run goes on with more or fewer of them, and sees
the very same batches. Position p of every batch belongs to a *lane*, a contiguous share of the
(permuted) rows; a worker takes a contiguous range of positions and reads the lanes that meet it.

* A table of at most `window_rows` rows has one lane, shuffled whole every epoch. Each worker
  reads the table and keeps its positions; reading so little N times costs nothing.
* A larger table is dealt out to LANES lanes: row groups are permuted, each lane owns a share of
  their rows and shuffles it window by window. A worker reads about an N-th of the rows (with
  more workers than lanes, several share one), in memory bounded by the window.

Batches are whole: the rows that do not fill the last one of an epoch wait for the next epoch,
which is permuted anew. A table smaller than a batch is a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from karma_ray.artifacts import open_filesystem
from karma_ray.errors import InputError

WINDOW_ROWS = 16_384
LANES = 16


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
class Part:
    """A lane's rows of a window: shuffled together, then cut into batches."""

    pieces: tuple[Piece, ...]
    key: tuple[int, ...]  # seed of the permutation
    cuts: tuple[tuple[int, int], ...]  # this worker's rows of each batch, after the permutation


@dataclass(frozen=True)
class Window:
    """Rows that are read at once, and the batches this worker makes of them."""

    epoch: int
    first_batch: int  # number within the epoch of the first batch that is taken from here
    num_batches: int
    positions: tuple[int, int]  # this worker's share of every batch
    parts: tuple[Part, ...]

    @property
    def batch_rows(self) -> int:
        """Rows of this worker in every batch."""
        return self.positions[1] - self.positions[0]

    @property
    def rows_read(self) -> int:
        """Rows in memory while the window is shuffled."""
        return sum(piece.stop - piece.start for part in self.parts for piece in part.pieces)


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
        tables: list[pa.Table] = []
        chosen: list[list[np.ndarray]] = []
        before = 0
        for part in window.parts:
            tables += [self._piece(piece) for piece in part.pieces]
            rows = sum(piece.stop - piece.start for piece in part.pieces)
            order = before + np.random.default_rng(part.key).permutation(rows)
            chosen.append([order[start:stop] for start, stop in part.cuts])
            before += rows
        by_batch = [cut for cuts in zip(*chosen, strict=True) for cut in cuts]
        return pa.concat_tables(tables).take(pa.array(np.concatenate(by_batch)))

    def _piece(self, piece: Piece) -> pa.Table:
        group = self.groups[piece.group]
        fs, _ = open_filesystem(self.uri)
        with fs.open(group.file, "rb") as source:
            table = pq.ParquetFile(source).read_row_group(group.index)
        return table.slice(piece.start, piece.stop - piece.start)


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
        if self.size < self.num_workers:
            raise InputError(
                "training.batch_size", self.size, f"rows are fewer than {self.num_workers} workers"
            )

    @property
    def size(self) -> int:
        """Rows of every batch, over all workers."""
        return min(self.batch_size, self.source.num_rows)

    @property
    def num_lanes(self) -> int:
        """Lanes of the table, whatever the number of workers."""
        return 1 if self.source.num_rows <= self.window_rows else min(LANES, self.size)

    @property
    def batches_per_epoch(self) -> int:
        return self.source.num_rows // self.size

    @property
    def positions(self) -> tuple[int, int]:
        """This worker's positions in every batch."""
        return _share(self.size, self.rank, self.num_workers)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, batches of it consumed) before `step`."""
        return divmod(step, self.batches_per_epoch)

    def windows(self, start_step: int, steps: int) -> Iterator[Window]:
        """The windows of batches `start_step` to `steps`, across epochs."""
        per_window = max(1, self.window_rows // self.size)
        permuted = -1
        while start_step < steps:
            epoch, batch = self.position(start_step)
            if epoch != permuted:
                order = np.random.default_rng((self.seed, epoch)).permutation(
                    len(self.source.groups)
                )
                permuted = epoch
            number = batch // per_window
            first = number * per_window
            stop = min(first + per_window, self.batches_per_epoch)
            taken = min(stop, batch + steps - start_step)
            parts = tuple(self._parts(order, epoch, first, stop, batch, taken))
            yield Window(epoch, batch, taken - batch, self.positions, parts)
            start_step += taken - batch

    def _parts(
        self, order: np.ndarray, epoch: int, first: int, stop: int, begin: int, end: int
    ) -> Iterator[Part]:
        """The window of batches `first` to `stop`, of which `begin` to `end` are taken."""
        low, high = self.positions
        for lane in range(self.num_lanes):
            start, after = _share(self.size, lane, self.num_lanes)
            width = after - start
            own = max(low, start) - start, min(high, after) - start
            if own[0] >= own[1]:
                continue
            cuts = [
                ((batch - first) * width + own[0], (batch - first) * width + own[1])
                for batch in range(begin, end)
            ]
            if self.num_lanes == 1:  # whole, with the rows that no batch of this epoch takes
                rows = (0, self.source.num_rows)
            else:
                offset = self.batches_per_epoch * start
                rows = offset + first * width, offset + stop * width
            pieces = tuple(_pieces(self.source.groups, order, *rows))
            yield Part(pieces, (self.seed, epoch, lane, first), tuple(cuts))


def _share(size: int, number: int, count: int) -> tuple[int, int]:
    """Bounds of the `number`-th of `count` shares of `size` positions."""
    return size * number // count, size * (number + 1) // count


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

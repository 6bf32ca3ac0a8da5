"""The order of the training rows: batch s of the training is a pure function of (seed, s).

It does not depend on the number of workers: a run goes on with more or fewer of them, and sees
the very same batches. Position p of every batch belongs to a *lane*, a contiguous share of the
(permuted) rows; a worker takes a contiguous range of positions and reads the lanes that meet it.

* A table of at most `window_rows` rows has one lane, shuffled whole every epoch. Each worker
  reads the table and keeps its positions; reading so little N times costs nothing.
* A larger table is dealt out to LANES lanes: row groups are permuted, each lane owns a share of
  their rows and shuffles it window by window. A worker reads about an N-th of the rows (with
  more workers than lanes, several share one), in memory bounded by the window. A row group is
  decoded for every window that a lane makes of it, so it should be small (ROW_GROUP_ROWS).

Batches are whole: the rows that do not fill the last one of an epoch wait for the next epoch,
which is permuted anew. A table smaller than a batch is a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from karma_ray.artifacts import data_files, open_filesystem
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
    width: int  # the lane's rows in every batch
    share: tuple[int, int]  # which of them are this worker's

    @property
    def num_rows(self) -> int:
        """Rows that are shuffled together."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    def chosen(self, skipped: int, num_batches: int) -> np.ndarray:
        """This worker's rows [num_batches, share] among the part's, batch by batch."""
        order = np.random.default_rng(self.key).permutation(self.num_rows)
        begin, end = skipped * self.width, (skipped + num_batches) * self.width
        return order[begin:end].reshape(num_batches, self.width)[:, slice(*self.share)]


@dataclass(frozen=True)
class Window:
    """Rows that are read at once, and the batches this worker makes of them."""

    epoch: int
    first_batch: int  # number within the epoch of the first batch that is taken from here
    num_batches: int
    skipped: int  # batches of this window in front of the first that is taken
    positions: tuple[int, int]  # this worker's share of every batch
    parts: tuple[Part, ...]

    @property
    def batch_rows(self) -> int:
        """Rows of this worker in every batch."""
        return self.positions[1] - self.positions[0]

    @property
    def rows_read(self) -> int:
        """Rows in memory while the window is shuffled."""
        return sum(part.num_rows for part in self.parts)


@dataclass(frozen=True)
class Source:
    """A Parquet folder and its row groups."""

    uri: str
    groups: tuple[RowGroup, ...]

    @classmethod
    def scan(cls, uri: str) -> Source:
        """Read the footers below `uri`; raises InputError when there is no row."""
        fs, path = open_filesystem(uri)
        files = data_files(uri, (".parquet",)) if fs.isdir(path) else [path]
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
        places: list[np.ndarray] = []
        before = 0
        for part in window.parts:
            chosen = part.chosen(window.skipped, window.num_batches)
            rows = pa.concat_tables([self._piece(piece) for piece in part.pieces])
            # Copied lane by lane, so that the row groups behind the slices can be freed.
            tables.append(rows.take(pa.array(chosen.ravel())))
            places.append(before + np.arange(chosen.size).reshape(chosen.shape))
            before += chosen.size
        if len(tables) == 1:
            return tables[0]
        return pa.concat_tables(tables).take(pa.array(np.concatenate(places, axis=1).ravel()))

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
        return 1 if self._is_small else min(LANES, self.size)

    @property
    def _is_small(self) -> bool:
        return self.source.num_rows <= self.window_rows

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
        rows: _Permuted | None = None
        while start_step < steps:
            epoch, batch = self.position(start_step)
            if rows is None or rows.epoch != epoch:
                rows = _Permuted(self.source.groups, self.seed, epoch)
            first = batch // per_window * per_window
            stop = min(first + per_window, self.batches_per_epoch)
            count = min(stop - batch, steps - start_step)
            parts = tuple(self._parts(rows, first, stop))
            yield Window(epoch, batch, count, batch - first, self.positions, parts)
            start_step += count

    def _parts(self, rows: _Permuted, first: int, stop: int) -> Iterator[Part]:
        """What this worker needs of the window of batches `first` to `stop`, lane by lane."""
        low, high = self.positions
        for lane in range(self.num_lanes):
            start, after = _share(self.size, lane, self.num_lanes)
            width = after - start
            own = max(low, start) - start, min(high, after) - start
            if own[0] >= own[1]:
                continue
            if self._is_small:  # whole, with the rows that no batch of this epoch takes
                bounds = 0, self.source.num_rows
            else:
                offset = self.batches_per_epoch * start
                bounds = offset + first * width, offset + stop * width
            key = self.seed, rows.epoch, lane, first
            yield Part(tuple(rows.pieces(*bounds)), key, width, own)


def _share(size: int, number: int, count: int) -> tuple[int, int]:
    """Bounds of the `number`-th of `count` shares of `size` positions."""
    return size * number // count, size * (number + 1) // count


class _Permuted:
    """The rows of an epoch: the permuted row groups, one behind the other."""

    def __init__(self, groups: tuple[RowGroup, ...], seed: int, epoch: int) -> None:
        self.groups, self.epoch = groups, epoch
        self._order = np.random.default_rng((seed, epoch)).permutation(len(groups))
        self._ends = np.cumsum([groups[index].rows for index in self._order])

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Rows `start` to `stop`."""
        at = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            index = int(self._order[at])
            rows, end = self.groups[index].rows, int(self._ends[at])
            upto = min(stop, end)
            yield Piece(index, start - (end - rows), upto - (end - rows))
            start, at = upto, at + 1

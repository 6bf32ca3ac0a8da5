"""The order of training rows: batch s is a pure function of (seed, s).

The order does not depend on the number of workers, so a run can continue with more or fewer of
them on the same batches. Each position of a batch belongs to a *lane*, a contiguous share of the
(permuted) rows; a worker takes a contiguous range of positions and reads the lanes that overlap it.

* A table of at most `window_rows` rows has one lane, which is shuffled as a whole every epoch.
  Every worker reads the whole table and keeps its positions, since such a table is small.
* A larger table is divided into LANES lanes: row groups are permuted, and each lane has a share of
  their rows and shuffles it window by window. A worker reads about 1/N of the rows (with more
  workers than lanes, several workers share a lane), in memory bounded by the window. A row group
  is decoded again for every window that uses it, so it should be small (ROW_GROUP_ROWS).

All batches have the same size: rows left over at the end of an epoch are skipped, and the next
epoch is permuted again. A table smaller than a batch is one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from karma_ray.artifacts import data_files, open_filesystem
from karma_ray.data.fragments import OpenFiles
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
    """A lane's rows in a window, which are shuffled together and then cut into batches."""

    pieces: tuple[Piece, ...]
    key: tuple[int, ...]  # seed of the permutation
    width: int  # the lane's rows in every batch
    share: tuple[int, int]  # this worker's range of them

    @property
    def num_rows(self) -> int:
        """Number of rows that are shuffled together."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    def chosen(self, skipped: int, num_batches: int) -> np.ndarray:
        """Return this worker's rows [num_batches, share] of the part, batch by batch."""
        order = np.random.default_rng(self.key).permutation(self.num_rows)
        begin, end = skipped * self.width, (skipped + num_batches) * self.width
        return order[begin:end].reshape(num_batches, self.width)[:, slice(*self.share)]


@dataclass(frozen=True)
class Window:
    """Rows that are read at once, and the batches that this worker builds from them."""

    epoch: int
    first_batch: int  # number within the epoch of the first batch used
    num_batches: int
    skipped: int  # batches of this window before the first one used
    positions: tuple[int, int]  # this worker's share of every batch
    parts: tuple[Part, ...]

    @property
    def batch_rows(self) -> int:
        """Number of rows of this worker in every batch."""
        return self.positions[1] - self.positions[0]

    @property
    def rows_read(self) -> int:
        """Number of rows in memory while the window is shuffled."""
        return sum(part.num_rows for part in self.parts)


@dataclass(frozen=True)
class Source:
    """A Parquet folder and its row groups."""

    uri: str
    groups: tuple[RowGroup, ...]

    @classmethod
    def scan(cls, uri: str) -> Source:
        """Read the file footers below `uri`; raises InputError when there is no row."""
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
        """Return this worker's rows of a window, in the order of its batches."""
        tables: list[pa.Table] = []
        places: list[np.ndarray] = []
        before = 0
        with OpenFiles(self.uri) as files:
            for part in window.parts:
                chosen = part.chosen(window.skipped, window.num_batches)
                rows = pa.concat_tables([self._piece(piece, files) for piece in part.pieces])
                # Copied for each lane, so that the row groups behind the slices can be freed.
                tables.append(rows.take(pa.array(chosen.ravel())))
                places.append(before + np.arange(chosen.size).reshape(chosen.shape))
                before += chosen.size
        if len(tables) == 1:
            return tables[0]
        return pa.concat_tables(tables).take(pa.array(np.concatenate(places, axis=1).ravel()))

    def _piece(self, piece: Piece, files: OpenFiles) -> pa.Table:
        group = self.groups[piece.group]
        table = files[group.file].read_row_group(group.index)
        return table.slice(piece.start, piece.stop - piece.start)


@dataclass(frozen=True)
class Order:
    """The rows of a worker, batch by batch, for the whole training."""

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
        """Number of rows of every batch, over all workers."""
        return min(self.batch_size, self.source.num_rows)

    @property
    def num_lanes(self) -> int:
        """Number of lanes of the table, independent of the number of workers."""
        return 1 if self.is_small else min(LANES, self.size)

    @property
    def is_small(self) -> bool:
        """Whether a window holds the whole table."""
        return self.source.num_rows <= self.window_rows

    @property
    def batches_per_epoch(self) -> int:
        return self.source.num_rows // self.size

    @property
    def batches_per_window(self) -> int:
        """Number of batches of every window but the last of an epoch, which may have fewer."""
        return max(1, self.window_rows // self.size)

    @property
    def windows_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.batches_per_window)

    @property
    def positions(self) -> tuple[int, int]:
        """This worker's range of positions in every batch."""
        return _share(self.size, self.rank, self.num_workers)

    def position(self, step: int) -> tuple[int, int]:
        """Return (epoch, batches consumed in it) before `step`."""
        return divmod(step, self.batches_per_epoch)

    def windows(self, start_step: int, steps: int) -> Windows:
        """Return the windows of batches `start_step` to `steps`, across epochs."""
        return Windows(self, start_step, steps)

    def window(self, epoch: int, batch: int, num_batches: int, rows: _Permuted) -> Window:
        """Return the window with `batch` of `epoch`, of which `num_batches` are used from there."""
        first = batch // self.batches_per_window * self.batches_per_window
        stop = min(first + self.batches_per_window, self.batches_per_epoch)
        parts = tuple(self._parts(rows, first, stop))
        return Window(epoch, batch, num_batches, batch - first, self.positions, parts)

    def _parts(self, rows: _Permuted, first: int, stop: int) -> Iterator[Part]:
        """Yield this worker's parts of the window of batches `first` to `stop`, by lane."""
        low, high = self.positions
        for lane in range(self.num_lanes):
            start, after = _share(self.size, lane, self.num_lanes)
            width = after - start
            own = max(low, start) - start, min(high, after) - start
            if own[0] >= own[1]:
                continue
            if self.is_small:  # the whole table, including rows that no batch will use
                bounds = 0, self.source.num_rows
            else:
                offset = self.batches_per_epoch * start
                bounds = offset + first * width, offset + stop * width
            key = self.seed, rows.epoch, lane, first
            yield Part(tuple(rows.pieces(*bounds)), key, width, own)


class Windows(Sequence[Window]):
    """The windows of some steps; each is computed when it is asked for, and none is held."""

    def __init__(self, order: Order, start_step: int, steps: int) -> None:
        self._order, self._start, self._steps = order, start_step, steps
        self._first = self._number(start_step)
        self._rows: _Permuted | None = None

    def __len__(self) -> int:
        if self._steps <= self._start:
            return 0
        return self._number(self._steps - 1) - self._first + 1

    @overload
    def __getitem__(self, at: int) -> Window: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Window, ...]: ...
    def __getitem__(self, at: int | slice) -> Window | tuple[Window, ...]:
        if isinstance(at, slice):
            return tuple(self[number] for number in range(*at.indices(len(self))))
        if not 0 <= at < len(self):
            raise IndexError(at)
        order = self._order
        epoch, place = divmod(self._first + at, order.windows_per_epoch)
        first = epoch * order.batches_per_epoch + place * order.batches_per_window
        begin = max(first, self._start)
        stop = min(first + order.batches_per_window, (epoch + 1) * order.batches_per_epoch)
        if self._rows is None or self._rows.epoch != epoch:
            self._rows = _Permuted(order.source.groups, order.seed, epoch)
        count = min(stop, self._steps) - begin
        return order.window(epoch, begin - epoch * order.batches_per_epoch, count, self._rows)

    def _number(self, step: int) -> int:
        """Return the number of the window with `step`, counted from the first epoch."""
        epoch, batch = self._order.position(step)
        return epoch * self._order.windows_per_epoch + batch // self._order.batches_per_window


def _share(size: int, number: int, count: int) -> tuple[int, int]:
    """Return the bounds of share `number` when `size` positions are divided into `count`."""
    return size * number // count, size * (number + 1) // count


class _Permuted:
    """The rows of an epoch: its permuted row groups, concatenated."""

    def __init__(self, groups: tuple[RowGroup, ...], seed: int, epoch: int) -> None:
        self.groups, self.epoch = groups, epoch
        self._order = np.random.default_rng((seed, epoch)).permutation(len(groups))
        self._ends = np.cumsum([groups[index].rows for index in self._order])

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Yield the pieces that make up rows `start` to `stop`."""
        at = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            index = int(self._order[at])
            rows, end = self.groups[index].rows, int(self._ends[at])
            upto = min(stop, end)
            yield Piece(index, start - (end - rows), upto - (end - rows))
            start, at = upto, at + 1

"""The passes of a long import over a log that need not fit into memory, as tasks.

    a file of the log     --ReadFile-->    its exposures by user, rejected rows
    a partition of users  --FoldUsers-->   its pages by time
    a part of the table   --WriteEvents--> one file of events/, from the pages of a range of times

The rows of a page may lie anywhere in a log: all rows of a user come into one partition, whatever
lies between them. Neither partitions nor ranges nor what runs at the same time show in the table.
What cannot be divided is held whole: a user's rows, and the pages of one microsecond.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa

from karma_ray.artifacts import read_table, value_hash, write_table
from karma_ray.data.event_parts import READERS
from karma_ray.data.importers.exposures import Exposures, LogFacts
from karma_ray.data.importers.import_work import (
    ImportSizes,
    ImportWork,
    RowsFile,
    in_columns,
    part_name,
    piece_names,
)
from karma_ray.data.importers.output import event_counts
from karma_ray.data.importers.page_folding import pages_of
from karma_ray.data.ordered_rows import read_ordered, write_ordered
from karma_ray.data.schema import EVENTS, TIME, check_columns
from karma_ray.data.table_hash import table_hash
from karma_ray.data.user_rows import slot_range, slots_of

_ROWS = pa.schema(
    [
        ("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", TIME),
        ("query", pa.string()), ("clicked", pa.bool_()), ("purchased", pa.bool_()),
        ("position", pa.float64()), ("impression_id", pa.string()), ("session_id", pa.string()),
        ("order", pa.int64()),
    ]
)  # fmt: skip
_PAGES = pa.schema([*EVENTS, ("position", pa.float64()), ("order", pa.int64())])
_ORDER = ("timestamp", "position", "order")
_SAMPLES = 32
"""Times that are known of the pages of a range before the ranges are chosen."""
_LIMITS = np.iinfo(np.int64)


@dataclass(frozen=True)
class ReadFile:
    """Reads one file of the log and writes its exposures by user."""

    log: Exposures
    work: ImportWork
    sizes: ImportSizes

    def name(self, file: str) -> str:
        """Return the name of its files in the work folder, another one if it has changed."""
        return value_hash([file, self.log.files.stamps[file]])

    def __call__(self, file: str) -> None:
        """Read a file; its facts in the work folder are written last."""
        facts, pieces = LogFacts(), _Pieces(self.work, self.name(file))
        for exposures, rejected in self.log.read(file, facts):
            pieces.add(exposures, rejected)
            if pieces.held_bytes >= self.sizes.rows_bytes:
                pieces.write()
        pieces.write()
        told = {"log": facts.to_json(), "bytes": pieces.num_bytes, "pieces": pieces.written}
        self.work.write_facts("read", self.name(file), told)


@dataclass
class _Pieces:
    """Writes the rows of a file in pieces that fit into memory."""

    work: ImportWork
    name: str
    written: dict[str, int] = field(default_factory=lambda: {"rows": 0, "quarantine": 0})
    num_bytes: int = 0
    held_bytes: int = 0
    _exposures: list[pl.DataFrame] = field(default_factory=list)
    _rejected: list[pl.DataFrame] = field(default_factory=list)

    def add(self, exposures: pl.DataFrame, rejected: pl.DataFrame) -> None:
        """Hold rows until they are written."""
        self._exposures.append(exposures)
        self._rejected.append(rejected)
        self.held_bytes += int(exposures.estimated_size() + rejected.estimated_size())

    def write(self) -> None:
        """Write what is held."""
        if not self._exposures:
            return
        rows, rejected = in_columns(pl.concat(self._exposures), _ROWS), pl.concat(self._rejected)
        if rows.num_rows:
            name = piece_names(self.name, self.written["rows"] + 1)[-1]
            path = self.work.path("rows", f"{name}.arrow")
            write_ordered(rows, slots_of(rows["user_id"], 1), path)
            self.written["rows"] += 1
            self.num_bytes += rows.nbytes
        if rejected.height:
            name = piece_names(self.name, self.written["quarantine"] + 1)[-1]
            write_table(rejected.to_arrow(), self.work.folder("quarantine"), name)
            self.written["quarantine"] += 1
        self._exposures, self._rejected, self.held_bytes = [], [], 0


@dataclass(frozen=True)
class FoldUsers:
    """Folds the exposures of one partition of users to pages, and writes them by time."""

    work: ImportWork
    rows: Sequence[RowsFile]
    num_partitions: int
    names: Sequence[str]
    """The columns that the log has."""
    item_ids: pa.Array
    by_row: bool
    sizes: ImportSizes

    def __call__(self, partition: int) -> None:
        """Fold a partition; its facts in the work folder are written last."""
        name = part_name(partition)
        pages, counts = pages_of(
            self._exposures(partition), self.names, self.item_ids, by_row=self.by_row
        )
        pages = pages.sort(_ORDER, nulls_last=True)
        times = pages["timestamp"].to_physical().to_numpy()
        path = self.work.path("pages/runs", f"{name}.arrow")
        write_ordered(in_columns(pages, _PAGES), times, path)
        write_table(pa.table({"time": times}), self.work.folder("pages/times"), name)
        # Each partition tells of other places, so that those of all lie evenly.
        every = _every(self.sizes.range_pages)
        told = times[partition * every // self.num_partitions :: every]
        facts = {"counts": asdict(counts), "times": told.tolist()}
        self.work.write_facts("pages/facts", name, facts)

    def _exposures(self, partition: int) -> pl.DataFrame:
        """Return the rows of a partition, those of each user in the order of the log."""
        slots = slot_range(partition, self.num_partitions, 1)

        def read(file: RowsFile) -> pl.DataFrame:
            table = read_ordered(self.work.path("rows", f"{file.name}.arrow"), slots, _ROWS)
            rows = pl.DataFrame(pl.from_arrow(table))
            return rows.with_columns(pl.col("order") + file.first_place)

        with ThreadPoolExecutor(READERS) as readers:
            return pl.concat(readers.map(read, self.rows))


@dataclass(frozen=True)
class EventsPart:
    """Consecutive rows of the table events."""

    number: int
    num_rows: int
    start: int
    stop: int
    """The rows are among the pages with start <= time < stop, in microseconds."""
    skip: int
    """Pages from `start` on that are before the rows."""


@dataclass(frozen=True)
class WriteEvents:
    """Writes one file of the table events from the pages of all partitions."""

    work: ImportWork
    num_partitions: int
    item_ids: pa.Array
    folder: str
    """The folder of the table."""

    def __call__(self, part: EventsPart) -> None:
        """Write a part; its facts in the work folder are written last."""
        name, times = part_name(part.number), (part.start, part.stop)

        def read(partition: int) -> pa.Table:
            path = self.work.path("pages/runs", f"{part_name(partition)}.arrow")
            return read_ordered(path, times, _PAGES)

        with ThreadPoolExecutor(READERS) as readers:
            read_pages = pa.concat_tables(readers.map(read, range(self.num_partitions)))
        pages = pl.DataFrame(pl.from_arrow(read_pages)).sort(_ORDER, nulls_last=True)
        rows = pages.slice(part.skip, part.num_rows).select(EVENTS.names).to_arrow()
        events = check_columns(rows, EVENTS, f"events of {self.folder}")
        assert events.num_rows == part.num_rows
        write_table(events, self.folder, name)
        facts = {"hash": table_hash(events), "counts": event_counts(events, self.item_ids)}
        self.work.write_facts("pages/events", name, {"rows": events.num_rows, **facts})


def divide(
    samples: Iterable[Sequence[int]], times: Iterable[np.ndarray], part_rows: int, range_pages: int
) -> list[EventsPart]:
    """Divide all pages in the order of time into parts of `part_rows`, the last one smaller.

    `samples` are some times of every partition, from which ranges of about `range_pages` are
    chosen, and `times` all its times in order, of which one partition is held at a time.
    """
    told = np.sort(np.fromiter((time for some in samples for time in some), np.int64))
    inner = np.unique(told[:: range_pages // _every(range_pages)])
    edges = np.array([_LIMITS.min, *inner, _LIMITS.max], np.int64)
    before = np.zeros(len(edges), np.int64)
    for of_partition in times:
        before[1:-1] += np.searchsorted(of_partition, inner)
        before[-1] += len(of_partition)
    parts = []
    for number, first in enumerate(range(0, int(before[-1]), part_rows)):
        end = min(first + part_rows, int(before[-1]))
        low = int(np.searchsorted(before, first, side="right")) - 1
        high = int(np.searchsorted(before, end, side="left"))
        bounds = int(edges[low]), int(edges[high])
        parts.append(EventsPart(number, end - first, *bounds, first - int(before[low])))
    return parts


def times_of(work: ImportWork, num_partitions: int) -> Iterable[np.ndarray]:
    """Yield the times of the pages of every partition, in their order."""
    for partition in range(num_partitions):
        path = work.path("pages/times", f"{part_name(partition)}.parquet")
        yield read_table(path)["time"].to_numpy()


def _every(range_pages: int) -> int:
    return max(1, range_pages // _SAMPLES)

"""Exposures to pages in bounded memory: an exchange by user, then one by time, over files.

    exposures --hash(user)--> buckets --fold each--> runs of pages in time order --> ranges of time

The rows of a page may lie anywhere in a log: all rows of a user come into one bucket, whatever lies
between them. A bucket and a range are held in memory, so they are chosen by the size of the log;
neither their number nor the batches in which rows come show in the pages. What cannot be divided is
held whole: a user's rows, and the pages of one microsecond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

BUCKET_BYTES = 1 << 26
"""Size of the log for each bucket."""
_MAX_BUCKETS = 512
_ROWS_PER_RANGE = 250_000
_LEAST_CHUNK = 512

TIME_US = pl.Datetime("us", "UTC")
EXPOSURES: dict[str, pl.DataType] = {
    "user_id": pl.String(), "item_id": pl.String(), "timestamp": TIME_US, "query": pl.String(),
    "clicked": pl.Boolean(), "purchased": pl.Boolean(), "position": pl.Float64(),
    "impression_id": pl.String(), "session_id": pl.String(), "order": pl.Int64(),
}  # fmt: skip
"""The columns of exposures, in which a column that the log lacks is null."""
_ORDER = ("timestamp", "position", "order")
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")

Fold = Callable[[pl.DataFrame], pl.DataFrame]
"""Exposures -> pages with `timestamp`, `position` and `order`, which order them in the log."""


@dataclass(frozen=True)
class _Chunk:
    """A record batch of a run, which is in time order."""

    run: int
    number: int
    first: int
    last: int
    num_rows: int


class PageSpool:
    """Takes exposures batch by batch and gives pages in time order, once, over files in `folder`.

    Pages of one time are ordered by the position and then the place in the log of their first row.
    """

    def __init__(self, folder: Path, num_bytes: int) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._num_buckets = min(_MAX_BUCKETS, 1 + num_bytes // BUCKET_BYTES)
        # A range takes about one chunk of each run.
        self._rows_per_chunk = max(_LEAST_CHUNK, _ROWS_PER_RANGE // self._num_buckets)
        self._writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}

    def add(self, exposures: pl.DataFrame) -> None:
        """Add rows with the columns EXPOSURES."""
        rows = exposures.select(pl.col(name).cast(kind) for name, kind in EXPOSURES.items())
        bucket = (pl.col("user_id").hash(0) % self._num_buckets).alias("bucket")
        for (number,), part in rows.group_by(bucket, maintain_order=True):
            self._write(int(str(number)), part)

    def _write(self, number: int, rows: pl.DataFrame) -> None:
        table = _plain(rows)
        if number not in self._writers:
            file = str(self._folder / f"bucket-{number}")
            self._writers[number] = pa.ipc.new_stream(file, table.schema, options=_OPTIONS)
        self._writers[number].write_table(table)

    def pages(self, fold: Fold) -> Iterator[pl.DataFrame]:
        """Yield the pages of all rows, without `position` and `order`."""
        for writer in self._writers.values():
            writer.close()
        chunks: list[_Chunk] = []
        for number in sorted(self._writers):
            source = self._folder / f"bucket-{number}"
            with pa.ipc.open_stream(str(source)) as reader:
                exposures = pl.from_arrow(reader.read_all())
            assert isinstance(exposures, pl.DataFrame)
            source.unlink()
            pages = fold(exposures).sort(_ORDER, nulls_last=True)
            chunks += self._write_run(number, pages)
        for start, stop in _ranges(chunks):
            found = [
                self._read(c, start, stop) for c in chunks if start <= c.last and c.first < stop
            ]
            part = pl.concat(found).sort(_ORDER, nulls_last=True)
            yield part.drop("position", "order")

    def _write_run(self, number: int, pages: pl.DataFrame) -> Iterator[_Chunk]:
        table = _plain(pages)
        times = pages["timestamp"].to_physical().to_numpy()
        with pa.ipc.new_file(str(self._folder / f"run-{number}"), table.schema,
                             options=_OPTIONS) as sink:  # fmt: skip
            for place, start in enumerate(range(0, len(times), self._rows_per_chunk)):
                stop = min(len(times), start + self._rows_per_chunk)
                (batch,) = table.slice(start, stop - start).combine_chunks().to_batches()
                sink.write_batch(batch)
                first, last = int(times[start]), int(times[stop - 1])
                yield _Chunk(number, place, first, last, stop - start)

    def _read(self, chunk: _Chunk, start: int, stop: int) -> pl.DataFrame:
        with pa.OSFile(str(self._folder / f"run-{chunk.run}")) as source:
            batch = pa.ipc.open_file(source).get_batch(chunk.number)
            rows = pl.from_arrow(pa.Table.from_batches([batch]))
        assert isinstance(rows, pl.DataFrame)
        time = pl.col("timestamp").to_physical()
        return rows.filter((time >= start) & (time < stop))


def _plain(rows: pl.DataFrame) -> pa.Table:
    """Return rows with Arrow's plain strings, which every version of it writes."""
    return rows.to_arrow(compat_level=pl.CompatLevel.oldest())


def _ranges(chunks: list[_Chunk]) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of times that hold about _ROWS_PER_RANGE pages each."""
    if not chunks:
        return
    firsts = np.array([chunk.first for chunk in chunks])
    order = np.argsort(firsts, kind="stable")
    reached = np.cumsum(np.array([chunk.num_rows for chunk in chunks])[order])
    places = np.searchsorted(reached, np.arange(0, int(reached[-1]), _ROWS_PER_RANGE), side="right")
    starts = np.unique(firsts[order][np.minimum(places, len(order) - 1)])
    starts[0] = firsts.min()
    stop = max(chunk.last for chunk in chunks) + 1
    yield from zip(starts.tolist(), [*starts[1:].tolist(), stop], strict=True)

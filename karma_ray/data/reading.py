"""Reading Parquet files some of which are damaged: what can be read is, and the rest is told.

A damaged file loses the row groups that cannot be read, or all its rows if its footer cannot be.
The quarantine then has one row for each such loss, with the file, the first row that was lost (null
if it is not known) and the reason; `record` says how much was lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from karma_ray.artifacts import open_filesystem
from karma_ray.data.schema import QUARANTINE
from karma_ray.errors import TooManyBadRows

BATCH_ROWS = 65_536
NO_FILE = "file cannot be read"
NO_GROUP = "rows cannot be read"
DAMAGE = (pa.ArrowException, OSError)
"""What reading a damaged file raises, and not only that: see `require_damage`."""


@dataclass(frozen=True)
class Lost:
    """Rows of a file that cannot be read."""

    file: str
    row: int | None
    """Number of the first lost row; None if the whole file is lost."""
    num_rows: int | None
    """Number of lost rows, or None if the file does not say it."""
    share: float
    """Lost share of the file's bytes."""
    error: str
    """What the reader said."""

    @property
    def reason(self) -> str:
        """The reason in the quarantine, the same for all losses of this kind."""
        return NO_FILE if self.row is None else NO_GROUP

    @property
    def record(self) -> str:
        """The record in the quarantine, as JSON text."""
        return json.dumps({"rows": self.num_rows, "error": self.error}, ensure_ascii=False)


def stream_rows(
    uri: str, columns: Iterable[str] | None = None, batch_rows: int = BATCH_ROWS,
    groups: tuple[int, int] | None = None,
) -> Iterator[tuple[int, pa.Table] | Lost]:  # fmt: skip
    """Yield the number of the first row and the rows of each batch, and what is lost.

    `columns` that the file does not have are left out; `groups` are the first row group and one
    past the last (default: all). Text that is not UTF-8 is damage.
    """
    fs, path = open_filesystem(uri)
    with fs.open(path, "rb") as source:
        try:
            file = pq.ParquetFile(source)
            names = file.schema_arrow.names
        except DAMAGE as error:
            require_damage(error)
            yield Lost(uri, None, None, 1.0, said(error))
            return
        wanted = None if columns is None else [name for name in columns if name in names]
        sizes = [file.metadata.row_group(n).total_byte_size for n in range(file.num_row_groups)]
        row = 0
        for group, size in enumerate(sizes):
            stop = row + file.metadata.row_group(group).num_rows
            if groups is not None and not groups[0] <= group < groups[1]:
                row = stop
                continue
            try:
                for batch in file.iter_batches(batch_rows, row_groups=[group], columns=wanted):
                    batch.validate(full=True)
                    yield row, pa.Table.from_batches([batch])
                    row += batch.num_rows
            except DAMAGE as error:
                require_damage(error)
                yield Lost(uri, row, stop - row, size / max(1, sum(sizes)), said(error))
            row = stop


def quarantine_of(lost: Iterable[Lost]) -> pa.Table:
    """Return the QUARANTINE of losses."""
    rows = [
        {"record": one.record, "source_file": one.file, "row": one.row, "reason": one.reason}
        for one in lost
    ]
    return pa.Table.from_pylist(rows, schema=QUARANTINE)


def check_lost(lost: Iterable[Lost], sizes: dict[str, int], max_share: float, source: str) -> None:
    """Raise TooManyBadRows when more than `max_share` of the bytes of `sizes` were lost.

    A file whose footer is gone does not say how many rows it had, so bytes are counted, not rows.
    """
    listed = list(lost)
    gone = sum(one.share * sizes[one.file] for one in listed)
    if listed and gone > max_share * max(1, sum(sizes.values())):
        files = sorted({one.file for one in listed})
        raise TooManyBadRows(
            f"{source}: {len(files)} of {len(sizes)} files cannot be read whole, and "
            f"{gone / max(1, sum(sizes.values())):.0%} of the bytes are lost "
            f"({files[0]}: {listed[0].error}); a share of {max_share:g} is allowed"
        )


def require_damage(error: Exception) -> None:
    """Raise the error of a store again: what could not be fetched is not lost.

    Arrow's own OSErrors have no number; those of an operating system or a store do, or are of a
    narrower class.
    """
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error


def said(error: Exception) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__

"""The folder in which a long import works, and from which it goes on after it was killed.

    read/NAME.json   what is known of a file of the log that was read; written last
    rows/NAME-00000.arrow, ...
                     its exposures, ordered by user (data/user_rows.py)
    quarantine/NAME-00000.parquet, ...
                     its rejected rows
    pages/           runs/, times/ and facts/ of every partition of users: its pages by time; and
                     events/, the facts of every part of the table that was written; removed when
                     the log or the items have changed

A file is written whole or not at all, and a task that runs twice replaces its own files with equal
ones. NAME depends on the file's path, size and version, so a file that has changed is read again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa

from karma_ray.artifacts import join, write_json
from karma_ray.data.work_folder import documents, open_work

VERSION = 1
"""Raised when the code reads or folds in another way; what older code has left is not used."""


@dataclass(frozen=True)
class ImportSizes:
    """How much one task takes; the output does not depend on it."""

    block_bytes: int = 1 << 24
    """Bytes of a text file that are read at a time."""
    rows_bytes: int = 1 << 26
    """Bytes of exposures of a file that are held before they are written by user."""
    partition_bytes: int = 1 << 26
    """Bytes of the exposures of a partition of users, on average."""
    range_pages: int = 1 << 17
    """Pages of a range of times, on average: a part of the table is read from whole ranges."""
    here_bytes: int = 1 << 28
    """Size of a log that is imported in this process, as starting Ray would take longer."""


@dataclass(frozen=True)
class ImportWork:
    """The paths in a work folder, and what is kept there."""

    uri: str

    def open(self, key: Any) -> None:
        """Keep what an earlier attempt left if it read logs as this one, or remove it."""
        open_work(self.uri, [VERSION, key])

    def open_pages(self, key: Any) -> None:
        """Keep pages of an earlier attempt if they were of the same rows; otherwise remove them."""
        open_work(self.folder("pages"), key)

    def folder(self, kind: str) -> str:
        """Return the folder of the files of this kind."""
        return join(self.uri, kind)

    def path(self, kind: str, name: str) -> str:
        """Return the path of a file of this kind."""
        return join(self.uri, kind, name)

    def write_facts(self, kind: str, name: str, facts: Any) -> None:
        """Write what is known of a finished task."""
        write_json(facts, self.path(kind, f"{name}.json"))

    def facts(self, kind: str) -> dict[str, Any]:
        """Return the facts of all finished tasks of a kind by name."""
        return documents(self.folder(kind))


@dataclass(frozen=True)
class RowsFile:
    """A file of exposures by user."""

    name: str
    first_place: int
    """Rows in the log before those of the file that it was read from."""


def part_name(number: int) -> str:
    """Return the name of the files of a part, a partition or a piece."""
    return f"part-{number:05d}"


def piece_names(name: str, count: int) -> list[str]:
    """Return the names of the files in which a task has written its rows."""
    return [f"{name}-{number:05d}" for number in range(count)]


def in_columns(rows: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    """Return the columns of `schema`, with nulls where the rows lack one."""
    table = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)

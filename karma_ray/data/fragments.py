"""Fragments (row groups) of Parquet folders, with their file and the number of their first row.

Reading by fragment keeps two facts that a plain dataset loses: the origin of a rejected row, and
the input order, which decides between pages with equal times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from karma_ray.artifacts import data_files, exists, join, open_filesystem, table_files
from karma_ray.data.reading import DAMAGE, require_damage, said
from karma_ray.errors import InputError

MOST_FILES = 64
BLOCK_ROWS = 16_384
"""Rows in memory at once where a table is streamed."""


@dataclass(frozen=True)
class Fragment:
    """One row group of one file."""

    path: str
    """Path of the file in its filesystem."""
    row_group: int
    """Number of the row group in the file."""
    first_row: int
    """Number of the fragment's first row in the file."""
    order: int
    """Number of the fragment's first row in the whole folder (files sorted by name)."""
    num_rows: int
    """Number of rows."""


def items_folder(data: str) -> str:
    """Return the folder items/ of a data folder, or the folder itself if it is one of items."""
    inside = join(data, "items")
    return data if not exists(inside) and data_files(data, (".parquet",)) else inside


def list_fragments(folder: str) -> tuple[list[Fragment], list[tuple[str, pa.Schema]]]:
    """Return the fragments of all Parquet files below `folder`, and the schema of each file.

    Raises InputError when the folder is missing, has no Parquet file or a broken one.
    """
    paths = table_files(folder)
    fs, _ = open_filesystem(folder)
    fragments: list[Fragment] = []
    schemas: list[tuple[str, pa.Schema]] = []
    order = 0
    for path in paths:
        with fs.open(path, "rb") as source:
            try:
                file = pq.ParquetFile(source)
            except DAMAGE as error:
                require_damage(error)
                raise InputError("file", path, f"is not Parquet ({said(error)})") from None
            schemas.append((path, file.schema_arrow))
            first_row = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                fragments.append(Fragment(path, group, first_row, order, rows))
                first_row, order = first_row + rows, order + rows
    return fragments, schemas


def read_fragment(
    folder: str, path: str, row_group: int, columns: list[str] | None = None
) -> pa.Table:
    """Read the rows of one fragment of `folder`; columns that are not in the file are left out.

    Folder names above the file (`category=shoes/`) become columns, unless the file has them. Raises
    InputError when the rows are damaged.
    """
    fs, root = open_filesystem(folder)
    with fs.open(path, "rb") as source:
        file = pq.ParquetFile(source)
        wanted = None
        if columns is not None:
            wanted = [name for name in columns if name in file.schema_arrow.names]
        try:
            table = file.read_row_group(row_group, columns=wanted)
        except DAMAGE as error:
            require_damage(error)
            problem = f"is damaged in row group {row_group} ({said(error)})"
            raise InputError("file", path, problem) from None
    for name, value in folder_columns(path, root).items():
        if name not in file.schema_arrow.names:
            table = table.append_column(name, pa.repeat(pa.scalar(value, pa.string()), len(table)))
    return table


class OpenFiles(ExitStack):
    """Parquet files by their path, open until this context is left, and at most MOST_FILES.

    The footer of a file, which is long if it has many rows, is read once.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._fs, self._open = open_filesystem(folder)[0], dict[str, pq.ParquetFile]()

    def __getitem__(self, path: str) -> pq.ParquetFile:
        if path not in self._open:
            if len(self._open) == MOST_FILES:
                self.close()
                self._open.clear()
            self._open[path] = pq.ParquetFile(self.enter_context(self._fs.open(path, "rb")))
        return self._open[path]


def row_blocks(folder: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield all rows of `folder` in order, in tables of at most BLOCK_ROWS rows.

    Columns that the files do not have are left out. Each file's footer is read once.
    """
    fs, _ = open_filesystem(folder)
    for path in table_files(folder):
        with fs.open(path, "rb") as source:
            file = pq.ParquetFile(source)
            wanted = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(BLOCK_ROWS, columns=wanted):
                yield pa.Table.from_batches([batch])


def folder_columns(path: str, root: str) -> dict[str, str | None]:
    """Return the columns of Hive-style folders between `root` and a file: `dt=2024-05-01/`."""
    parts = path.removeprefix(root).split("/")[:-1]
    pairs = [part.split("=", 1) for part in parts if "=" in part]
    return {
        unquote(name): None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)
        for name, value in pairs
    }

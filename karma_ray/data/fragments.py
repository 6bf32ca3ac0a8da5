"""Folders of Parquet files as fragments (row groups) that know their file and first row.

Reading by fragment keeps two things that a plain dataset read loses: where a rejected row came
from, and the input order, which breaks ties between pages of one time.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from karma_ray.artifacts import open_filesystem, table_files
from karma_ray.errors import InputError


@dataclass(frozen=True)
class Fragment:
    """One row group of one file."""

    path: str
    """File path inside its filesystem."""
    row_group: int
    """Row group inside the file."""
    first_row: int
    """Row number inside the file of the fragment's first row."""
    order: int
    """Row number inside the whole folder (files sorted by name) of the first row."""
    num_rows: int
    """Rows of the fragment."""


def list_fragments(folder: str) -> tuple[list[Fragment], list[tuple[str, pa.Schema]]]:
    """The fragments of every Parquet file below `folder`, and each file's schema.

    Raises InputError when the folder is missing, holds no Parquet file or a broken one.
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
            except pa.ArrowInvalid as error:
                raise InputError("file", path, f"is not Parquet ({error})") from None
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
    """The rows of one fragment of `folder`; columns the file does not have are left out.

    What the folders above the file name (`category=shoes/`) is a column where the file has none.
    """
    fs, root = open_filesystem(folder)
    with fs.open(path, "rb") as source:
        file = pq.ParquetFile(source)
        wanted = None
        if columns is not None:
            wanted = [name for name in columns if name in file.schema_arrow.names]
        table = file.read_row_group(row_group, columns=wanted)
    for name, value in folder_columns(path, root).items():
        if name not in file.schema_arrow.names:
            table = table.append_column(name, pa.repeat(pa.scalar(value, pa.string()), len(table)))
    return table


def folder_columns(path: str, root: str) -> dict[str, str | None]:
    """The columns that Hive-like folders between `root` and a file name: `dt=2024-05-01/`."""
    parts = path.removeprefix(root).split("/")[:-1]
    pairs = [part.split("=", 1) for part in parts if "=" in part]
    return {
        unquote(name): None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)
        for name, value in pairs
    }

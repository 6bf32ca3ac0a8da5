"""Fragments (row groups) of Parquet folders, with their file and the number of their first row.

Reading by fragment keeps two facts that a plain dataset loses: the origin of a rejected row, and
the input order, which decides between pages with equal times.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from karma_ray.artifacts import open_filesystem, table_files
from karma_ray.data.reading import DAMAGE, Lost, require_damage, said
from karma_ray.errors import InputError


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


def list_fragments(
    folder: str, lost: list[Lost] | None = None
) -> tuple[list[Fragment], list[tuple[str, pa.Schema]]]:
    """Return the fragments of all Parquet files below `folder`, and the schema of each file.

    Files that cannot be read are left out and added to `lost`, if it is given. Raises InputError
    when the folder is missing, has no Parquet file, or a broken one and no `lost`.
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
                if lost is None:
                    raise InputError("file", path, f"is not Parquet ({error})") from None
                lost.append(Lost(path, None, None, 1.0, said(error)))
                continue
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

    Folder names above the file (`category=shoes/`) become columns, unless the file has them.
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


def read_or_lose(
    folder: str, fragment: Fragment, columns: list[str] | None = None
) -> pa.Table | Lost:
    """Return the rows of `fragment` as `read_fragment` does, or what is lost if it is damaged."""
    try:
        table: pa.Table = read_fragment(folder, fragment.path, fragment.row_group, columns)
        table.validate(full=True)  # text that is not UTF-8 fails here
    except DAMAGE as error:
        require_damage(error)
        return Lost(fragment.path, fragment.first_row, fragment.num_rows, 0.0, said(error))
    return table


def folder_columns(path: str, root: str) -> dict[str, str | None]:
    """Return the columns of Hive-style folders between `root` and a file: `dt=2024-05-01/`."""
    parts = path.removeprefix(root).split("/")[:-1]
    pairs = [part.split("=", 1) for part in parts if "=" in part]
    return {
        unquote(name): None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)
        for name, value in pairs
    }

"""Parts of a log: consecutive row groups of one file, which one task reads and checks.

How a log is divided into files, row groups and parts changes no row of the output. Sizes are
counted in *cells*: the values of all columns of EVENTS, where a list has one cell per entry. Unlike
bytes they depend on the rows alone, not on how they are encoded or divided.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from karma_ray.artifacts import join, open_filesystem, table_files, value_hash
from karma_ray.data.fragments import folder_columns
from karma_ray.data.reading import DAMAGE, Lost, require_damage, stream_rows
from karma_ray.data.schema import EVENTS
from karma_ray.errors import InputError

NO_NUMBERS = np.empty(0, np.int64)
READERS = 16
"""Files whose footers are read at the same time; a store answers each after a while."""
_DAY = re.compile(r"(?:^|/)[^/=]+=(\d{4}-\d\d-\d\d)/")


@dataclass(frozen=True)
class Sizes:
    """How much one task takes; the rows do not depend on it, only their order and files."""

    part_cells: int = 1 << 22
    """Cells of a part, about 64 MiB in memory; a row group is never divided."""
    partition_cells: int = 1 << 22
    """Cells of a partition of users, on average, above which there are more partitions."""
    here_cells: int = 1 << 23
    """Cells of a log that is prepared in this process, as starting Ray would take longer."""


@dataclass(frozen=True)
class EventPart:
    """Some row groups of one file."""

    file: str
    """Path below events/."""
    stamp: str
    """Size and time, or the store's ETag, of the file; another content has another stamp."""
    groups: tuple[int, int]
    """First row group, and one past the last."""
    first_row: int
    """Number of the first row in the file."""
    num_rows: int
    cells: int

    @property
    def name(self) -> str:
        """The name of its files in the work folder, the same in every attempt."""
        return value_hash([self.file, self.stamp, self.groups])

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return int(self.stamp.split()[0])

    @property
    def day(self) -> str | None:
        """The date in the name of a folder above the file, such as `day=2024-05-01/`."""
        return day_of(self.file)


def day_of(file: str) -> str | None:
    """Return the last date in the names of the folders above a file, or None."""
    found = _DAY.findall(file)
    return found[-1] if found else None


def list_parts(
    folder: str, sizes: Sizes, known: Mapping[str, list[EventPart]] | None = None,
    since: str | None = None,
) -> list[EventPart]:  # fmt: skip
    """Return the parts of all Parquet files below `folder`, in the order of their rows.

    Files that are as they were when their parts became `known` are not opened. One that is not
    Parquet is a part without rows, so that it is reported as the rows of others are. Raises
    InputError when the folder is missing or empty, when a file has wrong columns, and when a file
    of a day before `since` is not known.
    """
    known = known or {}
    fs, root = open_filesystem(folder)
    files = []
    for path in table_files(folder):
        file, stamp = path.removeprefix(root).lstrip("/"), stamp_of(fs.info(path))
        files.append((path, file, stamp))
    old = [_standing(known.get(file), stamp) for _, file, stamp in files]
    opened = [place for place, parts in enumerate(old) if parts is None]
    with ThreadPoolExecutor(READERS) as readers:
        found = readers.map(lambda place: _parts_of(fs, *files[place], sizes), opened)
        new = dict(zip(opened, found, strict=True))
    if since is not None:
        _refuse_old_days([part for parts in new.values() for part in parts], since)
    parts = [part for place, kept in enumerate(old) for part in (kept or new.get(place, []))]
    if not parts:
        raise InputError("events", folder, "holds no row")
    return parts


def by_file(parts: Sequence[EventPart]) -> dict[str, list[EventPart]]:
    """Return the parts of every file, as `list_parts` knows them."""
    files: dict[str, list[EventPart]] = {}
    for part in parts:
        files.setdefault(part.file, []).append(part)
    return files


def starts(parts: Sequence[EventPart]) -> list[int]:
    """Return the number in the whole log of every part's first row."""
    return [0, *accumulate(part.num_rows for part in parts)][:-1]


@dataclass(frozen=True)
class PartRows:
    """What could be read of a part."""

    table: pa.Table
    numbers: np.ndarray
    """The number in the file of each row."""
    lost: tuple[Lost, ...] = ()


def read_part(folder: str, part: EventPart) -> PartRows:
    """Read the rows of one part; folder names above the file (`day=2024-05-01/`) become columns.

    Row groups that are damaged, or have text that is not UTF-8, are lost.
    """
    uri, groups = join(folder, part.file), part.groups
    fs, path = open_filesystem(uri)
    try:
        with fs.open(path, "rb") as source:
            table = pq.ParquetFile(source).read_row_groups(list(range(*groups)))
        table.validate(full=True)
        numbers, lost = np.arange(part.first_row, part.first_row + table.num_rows), []
    except DAMAGE as error:
        require_damage(error)
        found = list(stream_rows(uri, groups=groups))
        lost = [one for one in found if isinstance(one, Lost)]
        read = [one for one in found if not isinstance(one, Lost)]
        table = pa.concat_tables([rows for _, rows in read] or [EVENTS.empty_table()])
        numbers = np.concatenate(
            [first + np.arange(len(rows)) for first, rows in read] or [NO_NUMBERS]
        )
    _, root = open_filesystem(folder)
    for name, value in folder_columns(path, root).items():
        if name not in table.column_names:
            table = table.append_column(name, pa.repeat(pa.scalar(value, pa.string()), len(table)))
    return PartRows(table, numbers, tuple(lost))


def to_json(part: EventPart) -> dict[str, Any]:
    """Return a part as plain JSON values."""
    return asdict(part)


def from_json(value: Mapping[str, Any]) -> EventPart:
    """Read what `to_json` returned."""
    return EventPart(**{**value, "groups": tuple(value["groups"])})


def _standing(parts: list[EventPart] | None, stamp: str) -> list[EventPart] | None:
    return parts if parts and parts[0].stamp == stamp else None


def stamp_of(info: Mapping[str, Any]) -> str:
    """Return the size and the version of a file that a filesystem tells of."""
    version = next(filter(None, (info.get(name) for name in ("ETag", "mtime", "created"))), "")
    return f"{info['size']} {version}"


def _refuse_old_days(new: Sequence[EventPart], since: str) -> None:
    for part in new:
        if part.day is None:
            problem = f"needs events/day=YYYY-MM-DD/; {part.file} has no day"
            raise InputError("--since", since, problem)
        if part.day < since:
            problem = f"is after {part.file}, which is new or changed: prepare without it once"
            raise InputError("--since", since, problem)


def _parts_of(fs: Any, path: str, file: str, stamp: str, sizes: Sizes) -> list[EventPart]:
    """Divide the row groups of a file; raises InputError when it has wrong columns."""
    from karma_ray.data.validation import event_columns  # needs polars

    with fs.open(path, "rb") as source:
        try:
            opened = pq.ParquetFile(source)
        except DAMAGE as error:
            require_damage(error)
            return [EventPart(file, stamp, (0, 0), 0, 0, 0)]
        event_columns(opened.schema_arrow.empty_table(), path)
        groups = [_size(opened.metadata.row_group(n)) for n in range(opened.num_row_groups)]
    edges, filled = [0], 0
    for number, (_, cells) in enumerate(groups):
        if number > edges[-1] and filled + cells > sizes.part_cells:
            edges, filled = [*edges, number], 0
        filled += cells
    parts, first_row = [], 0
    for first, end in pairwise([*edges, len(groups)]):
        rows, cells = (sum(column) for column in zip(*groups[first:end], strict=True))
        if rows:
            parts.append(EventPart(file, stamp, (first, end), first_row, rows, cells))
        first_row += rows
    return parts


def _size(group: pq.RowGroupMetaData) -> tuple[int, int]:
    """Return rows and cells of a row group."""
    columns = [group.column(number) for number in range(group.num_columns)]
    ours = [c.num_values for c in columns if c.path_in_schema.split(".")[0] in EVENTS.names]
    return group.num_rows, sum(ours)

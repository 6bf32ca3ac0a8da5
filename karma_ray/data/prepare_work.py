"""The folder in which `prepare` works, and from which it goes on after it was killed.

    parts/NAME.json       what is known of a part that was checked; written last
    rows/NAME.arrow       its clean rows, ordered by user (user_rows.py)
    times/, unknown/, quarantine/NAME.parquet
                          its clicks per time, ids that are no items, and rejected rows
    files.json            the parts of every file, so that a file that did not change is not opened
    catalogue/            the ids of items that the parts were checked against
    build/                the new tables, with reports/part-00000.json of every finished partition;
                          removed when the parts, the cutoffs or the configuration have changed

A file of a part is written whole or not at all, and a part that is made twice replaces its own
files with equal ones. If the log is divided by days (`events/day=2024-05-01/`) all but build/ stays
when a job has ended, so that the next one checks new days only.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from karma_ray.artifacts import (
    exists,
    join,
    open_filesystem,
    read_json,
    read_table,
    remove,
    write_json,
    write_table,
)
from karma_ray.data.event_parts import READERS, EventPart, by_file, day_of, from_json, to_json
from karma_ray.data.work_folder import open_work

VERSION = 1
"""Raised when the code checks or writes parts in another way; old ones are then made again."""
_KINDS = {"parts": "json", "rows": "arrow", "times": "parquet", "unknown": "parquet",
          "quarantine": "parquet"}  # fmt: skip


@dataclass(frozen=True)
class PrepareWork:
    """The paths in a work folder, and what is kept there."""

    uri: str

    def path(self, kind: str, part: EventPart) -> str:
        """Return the path of one of a part's files."""
        return join(self.uri, kind, f"{part.name}.{_KINDS[kind]}")

    @property
    def build(self) -> str:
        """The folder of the new tables."""
        return join(self.uri, "build")

    def open(self, key: Any) -> None:
        """Keep what an earlier attempt left if it made the same parts, and remove it otherwise."""
        open_work(self.uri, [VERSION, key])

    def open_build(self, key: Any) -> None:
        """Keep the partitions of an interrupted attempt if they are those that are to be built."""
        open_work(self.build, key)

    def close(self) -> None:
        """Remove what is not needed: all of it, or if the log is divided by days the new tables."""
        fs, _ = open_filesystem(self.uri)
        fs.invalidate_cache()
        by_day = any(day_of(file) for file in self.known_parts())
        remove(self.build if by_day else self.uri)

    def known_parts(self) -> dict[str, list[EventPart]]:
        """Return the parts of files that were opened before, by file."""
        path = join(self.uri, "files.json")
        known = read_json(path) if exists(path) else []
        return by_file([from_json(part) for part in known])

    def write_parts(self, parts: Sequence[EventPart]) -> None:
        """Remember the parts of all files, and forget those that are no longer in the log."""
        write_json([to_json(part) for part in parts], join(self.uri, "files.json"))
        names = {part.name for part in parts}
        self._remove(name for name in self.names("parts") if name not in names)

    def match_catalogue(self, item_ids: pa.Array) -> None:
        """Remove the parts in which other ids are items than before, and remember `item_ids`.

        If items were only added, these are the parts that have one of them; otherwise all are.
        """
        folder = join(self.uri, "catalogue")
        if self.names("parts"):
            before = read_table(folder)["item_id"].combine_chunks()
            added = item_ids.filter(pc.invert(pc.is_in(item_ids, value_set=before)))
            if len(before) + len(added) != len(item_ids):
                self._remove(self.names("parts"))
            elif len(added):
                self._remove(name for name in self.names("unknown") if self._has(name, added))
            else:
                return
            remove(self.build)
        write_table(pa.table({"item_id": item_ids}), folder)

    def facts(self, parts: Sequence[EventPart]) -> list[dict[str, Any] | None]:
        """Return what was reported of every part, or None for a part that is not finished."""
        done = set(self.names("parts"))
        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(
                lambda part: self.facts_of(part) if part.name in done else None, parts
            ))  # fmt: skip

    def facts_of(self, part: EventPart) -> dict[str, Any] | None:
        """Return what was reported of one part, or None if it is not finished."""
        path = self.path("parts", part)
        return dict(read_json(path)) if exists(path) else None

    def reports(self) -> dict[int, dict[str, Any]]:
        """Return the reports of the partitions that were built."""
        fs, path = open_filesystem(join(self.build, "reports"))
        fs.invalidate_cache()
        names = [name for name in fs.find(path) if name.endswith(".json")]
        with ThreadPoolExecutor(READERS) as readers:
            found = readers.map(lambda name: read_json(fs.unstrip_protocol(name)), names)
            return {report["partition"]: report for report in found}

    def times(self, parts: Sequence[EventPart], first: int, end: int) -> pa.Table:
        """Return the times (CLICK_TIMES) in first <= time < end of `parts`, which have some."""
        tables = [read_table(self.path("times", part)) for part in parts]
        whole = pa.concat_tables(tables)
        inside = pc.and_(pc.greater_equal(whole["time"], first), pc.less(whole["time"], end))
        return whole.filter(inside)

    def write_part_table(self, kind: str, part: EventPart, table: pa.Table) -> None:
        """Write one of a part's tables, whole or not at all; a table without rows has no file."""
        if table.num_rows:
            write_table(table, join(self.uri, kind), part.name)
        else:
            remove(self.path(kind, part))  # of an attempt with other rows

    def _has(self, name: str, item_ids: pa.Array) -> bool:
        unknown = read_table(join(self.uri, "unknown", f"{name}.parquet"))["item_id"]
        return bool(pc.any(pc.is_in(unknown, value_set=item_ids)).as_py())

    def names(self, kind: str) -> list[str]:
        """Return the names of the parts that have a file of this kind."""
        fs, path = open_filesystem(join(self.uri, kind))
        fs.invalidate_cache()
        ending = f".{_KINDS[kind]}"
        names = (name.rsplit("/", 1)[1] for name in fs.find(path))
        return [name.removesuffix(ending) for name in names if name.endswith(ending)]

    def _remove(self, names: Any) -> None:
        for name in list(names):
            for kind, ending in _KINDS.items():  # its facts first, so that it is not finished
                remove(join(self.uri, kind, f"{name}.{ending}"))

"""The data folder before and after `prepare`: checking the items, and publishing the output.

New tables are written to `DATA/prepare-work/` and replace the old ones only when all are complete.
`prepared.json` is removed first and written last, so that a half-replaced folder is never taken
for a prepared one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from karma_ray.artifacts import exists, join, move, open_filesystem, remove, write_json, write_table
from karma_ray.data.event_parts import EventPart, starts
from karma_ray.data.fragments import Fragment, list_fragments, read_fragment
from karma_ray.data.prepare_work import PrepareWork
from karma_ray.data.reading import Lost, check_lost
from karma_ray.data.schema import EXAMPLES, ITEMS, QUARANTINE, SEQUENCES, check_columns
from karma_ray.data.validation import (
    Checked,
    check_items,
    check_share,
    count_reasons,
    records_of,
)
from karma_ray.errors import TooManyBadRows

WORK = "prepare-work"
"""Folder in the target in which new tables are written."""


def read_catalogue(data_uri: str, with_categories: bool = False) -> Checked:
    """Return the ids (and categories) of valid items, and the rejected rows.

    Texts are not kept. Raises InputError on wrong columns.
    """
    folder = join(data_uri, "items")
    fragments, schemas = list_fragments(folder)
    for path, schema in schemas:
        check_columns(schema.empty_table(), ITEMS, path)
    names = ["item_id", "title", *(["category"] if with_categories else [])]
    tables = [check_columns(ITEMS.empty_table(), ITEMS, folder).select(names)]
    for fragment in fragments:
        rows = _read_items(folder, fragment, names)
        start = pc.utf8_slice_codeunits(pc.utf8_trim_whitespace(rows["title"]), 0, 1)
        tables.append(rows.set_column(1, "title", start))  # enough to see that there is one
    checked = check_items(pa.concat_tables(tables))
    counts = {**checked.counts, "items": checked.table.num_rows}
    rejected = _with_files(checked.quarantine, folder, fragments)
    return Checked(checked.table, rejected, counts, checked.unknown_ids)


class Staging:
    """Publishes the tables of a work folder in `target`."""

    def __init__(self, target: str, work: PrepareWork, events: str, of_items: pa.Table) -> None:
        """`events` is the folder of the log; `of_items` are the rejected items."""
        self._target, self._work, self._of_items = target, work, of_items
        self._events = events

    def check_items(self, rows: int, max_share: float) -> None:
        """Raise TooManyBadRows when too many items were rejected, which are then published."""
        with self._published(()):
            check_share(count_reasons(self._of_items), rows, max_share, "items")

    def check_events(
        self, parts: Sequence[EventPart], checked: Sequence[Mapping[str, Any]], max_share: float
    ) -> None:
        """Raise TooManyBadRows when too many events were rejected, which are then published.

        Files that cannot be read whole count by their bytes.
        """
        rows = sum(facts["counts"]["event_rows"] for facts in checked)
        reasons = add_reasons(checked, self._of_items.slice(0, 0))
        lost = [Lost(**one) for facts in checked for one in facts["lost"]]
        sizes = {join(self._events, part.file): part.num_bytes for part in parts}
        with self._published(parts):
            check_lost(lost, sizes, max_share, "events")
            check_share(reasons, rows, max_share, "events")

    def publish(self, parts: Sequence[EventPart], facts: dict[str, Any]) -> None:
        """Replace the old tables by the new ones and write prepared.json.

        Whoever is killed meanwhile has to build the partitions again.
        """
        build = self._work.build
        empty = [("sequences", SEQUENCES)]
        empty += [(f"examples/split={split}", EXAMPLES) for split in ("valid", "test")]
        for name, schema in empty:
            fs, path = open_filesystem(join(build, name))
            if not fs.exists(path):  # no partition had a user
                write_table(schema.empty_table(), join(build, name))
        self._gather_quarantine(parts)
        remove(join(build, "key.json"))
        remove(join(self._target, "prepared.json"))
        for table in ("sequences", "examples", "quarantine"):
            self._replace(table)
        write_json(facts, join(self._target, "prepared.json"))

    @contextmanager
    def _published(self, parts: Sequence[EventPart]) -> Iterator[None]:
        """Publish the quarantine if there are too many bad rows, and say where."""
        try:
            yield
        except TooManyBadRows as error:
            self._gather_quarantine(parts)
            self._replace("quarantine")
            where = join(self._target, "quarantine")
            raise TooManyBadRows(f"{error}; the rows are in {where}") from None

    def _gather_quarantine(self, parts: Sequence[EventPart]) -> None:
        folder = join(self._work.build, "quarantine")
        remove(folder)
        write_table(self._of_items, folder, "items")
        fs, there = open_filesystem(folder)
        names = set(self._work.names("quarantine")) if parts else set()
        for number, (part, start) in enumerate(zip(parts, starts(parts), strict=True)):
            if part.name in names:
                _, path = open_filesystem(self._work.path("quarantine", part))
                # A file that cannot be read has no rows, so the next one starts where it does.
                name = f"part-{start:012d}" if part.num_rows else f"file-{number:06d}"
                fs.copy(path, f"{there}/events-{name}.parquet")

    def _replace(self, table: str) -> None:
        new, old = join(self._work.build, table), join(self._target, table)
        if exists(old):
            remove(f"{new}.old")
            move(old, f"{new}.old")
        move(new, old)


def add_reasons(checked: Sequence[Mapping[str, Any]], of_items: pa.Table) -> dict[str, int]:
    """Count rejected rows of all parts and of the items per reason, most frequent first."""
    total: Counter[str] = Counter()
    for reasons in [*(facts["reasons"] for facts in checked), count_reasons(of_items)]:
        total.update(reasons)
    return dict(total.most_common())


def _read_items(folder: str, fragment: Fragment, names: list[str]) -> pa.Table:
    rows = read_fragment(folder, fragment.path, fragment.row_group, names)
    return check_columns(rows, ITEMS, fragment.path).select(names)


def _with_files(quarantine: pa.Table, folder: str, fragments: list[Fragment]) -> pa.Table:
    """Replace row numbers in the whole folder by those in files, and read the records."""
    rows = quarantine["row"].to_numpy()
    first = np.array([fragment.order for fragment in fragments], dtype=np.int64)
    place = np.searchsorted(first, rows, side="right") - 1
    names = [name for name in ITEMS.names if name != "image"]
    records: list[str] = []
    for number in np.unique(place):  # ascending, as the rows are
        inside = pa.array(rows[place == number] - first[number])
        records += records_of(_read_items(folder, fragments[number], names).take(inside))
    found = [fragments[number] for number in place]
    columns = {
        "record": records,
        "source_file": [fragment.path for fragment in found],
        "row": [row - at.order + at.first_row for row, at in zip(rows, found, strict=True)],
        "reason": quarantine["reason"],
    }
    return pa.table(columns, schema=QUARANTINE)

"""The data folder before and after `prepare`: checking the input, and publishing the output.

New tables are written to `DATA/prepare-work/` and replace the old ones only when all are complete.
`prepared.json` is removed first and written last, so that a half-replaced folder is never taken
for a prepared one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from karma_ray.artifacts import (
    exists,
    join,
    move,
    open_filesystem,
    read_table,
    remove,
    write_json,
    write_table,
)
from karma_ray.data.fragments import Fragment, list_fragments, read_fragment
from karma_ray.data.schema import EXAMPLES, ITEMS, QUARANTINE, SEQUENCES, check_columns
from karma_ray.data.validation import (
    ITEM_REASONS,
    check_items,
    check_share,
    count_reasons,
    event_columns,
)
from karma_ray.errors import InputError, TooManyBadRows

WORK = "prepare-work"
"""Folder in the target in which new tables are written."""


def event_fragments(data_uri: str) -> list[Fragment]:
    """List the row groups of events/; raises InputError on wrong columns before work starts."""
    folder = join(data_uri, "events")
    fragments, schemas = list_fragments(folder)
    for path, schema in schemas:
        event_columns(schema.empty_table(), path)
    fragments = [fragment for fragment in fragments if fragment.num_rows]
    if not fragments:
        raise InputError("events", folder, "holds no row")
    return fragments


def read_catalogue(
    data_uri: str, target: str, max_bad_share: float
) -> tuple[pa.Table, dict[str, int]]:
    """Return the valid items and counts, and quarantine bad ones in `target`'s work folder.

    Raises InputError on wrong columns, and TooManyBadRows.
    """
    folder = join(data_uri, "items")
    fragments, schemas = list_fragments(folder)
    for path, schema in schemas:
        check_columns(schema.empty_table(), ITEMS, path)
    names = [name for name in ITEMS.names if name != "image"]
    tables = [check_columns(ITEMS.empty_table(), ITEMS, folder).select(names)]
    for fragment in fragments:
        rows = read_fragment(folder, fragment.path, fragment.row_group, names)
        tables.append(check_columns(rows, ITEMS, fragment.path).select(names))
    checked = check_items(pa.concat_tables(tables))
    quarantine = _with_files(checked.quarantine, fragments)
    write_table(quarantine, join(target, WORK, "quarantine"), "items")
    rows = checked.counts["item_rows"]
    _check_share(target, count_reasons(quarantine), rows, max_bad_share, "items")
    return checked.table, {**checked.counts, "items": checked.table.num_rows}


def count_quarantined(target: str, event_rows: int, max_bad_share: float) -> dict[str, int]:
    """Count quarantined rows of items and events per reason; raises TooManyBadRows on events."""
    reasons = count_reasons(read_table(join(target, WORK, "quarantine")))
    of_events = {reason: n for reason, n in reasons.items() if reason not in ITEM_REASONS}
    _check_share(target, of_events, event_rows, max_bad_share, "events")
    return reasons


def publish(target: str, facts: dict[str, Any]) -> None:
    """Replace the old tables by the new ones and write prepared.json."""
    work = join(target, WORK)
    empty = [("sequences", SEQUENCES)]
    empty += [(f"examples/split={split}", EXAMPLES) for split in ("valid", "test")]
    for name, schema in empty:
        fs, path = open_filesystem(join(work, name))
        if not fs.exists(path):  # no partition had a user
            write_table(schema.empty_table(), join(work, name))
    remove(join(target, "prepared.json"))
    for table in ("sequences", "examples", "quarantine"):
        _replace(target, table)
    write_json(facts, join(target, "prepared.json"))


def _check_share(
    target: str, reasons: dict[str, int], rows: int, max_bad_share: float, source: str
) -> None:
    """Apply check_share, but keep the quarantine for inspection."""
    try:
        check_share(reasons, rows, max_bad_share, source)
    except TooManyBadRows as error:
        _replace(target, "quarantine")
        raise TooManyBadRows(f"{error}; the rows are in {join(target, 'quarantine')}") from None


def _replace(target: str, table: str) -> None:
    new, old = join(target, WORK, table), join(target, table)
    if exists(old):
        move(old, f"{new}.old")
    move(new, old)


def _with_files(quarantine: pa.Table, fragments: list[Fragment]) -> pa.Table:
    """Replace row numbers in the whole folder by files and row numbers in them."""
    rows = quarantine["row"].to_numpy()
    starts = np.array([fragment.order for fragment in fragments], dtype=np.int64)
    found = [fragments[place] for place in np.searchsorted(starts, rows, side="right") - 1]
    columns = {
        "record": quarantine["record"],
        "source_file": [fragment.path for fragment in found],
        "row": [row - at.order + at.first_row for row, at in zip(rows, found, strict=True)],
        "reason": quarantine["reason"],
    }
    return pa.table(columns, schema=QUARANTINE)

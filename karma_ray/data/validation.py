"""Validation of raw rows: bad rows are quarantined with a reason, the others are used.

A wrong *column* (missing, or of an unreadable type) is an InputError; a wrong *row* is quarantined,
and the job stops only if their share is larger than allowed (TooManyBadRows). A row is quarantined
once, for the first reason that applies:

events  empty user_id | timestamp is not a time              the row is dropped
        null item id in a list                               the entry is dropped, the row is kept
        click on an item not in the catalogue                the click is dropped, the page is kept
items   empty item_id | empty title | duplicate item_id (the first is kept)

Ids such as `nan` or `NULL` count as empty too (identifiers.MISSING).

A page without clicks is not an error: it is counted and left out, as it has no click to learn.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from karma_ray.data.catalog import usable_items
from karma_ray.data.identifiers import MISSING
from karma_ray.data.schema import EVENTS, QUARANTINE, TIME, check_columns
from karma_ray.errors import InputError, TooManyBadRows

CLEAN_EVENTS = pa.schema([*EVENTS, pa.field("order", pa.int64())])
"""Validated events: lists contain catalogue items only; `order` is the input row number."""

NO_USER = "empty user_id"
NO_TIME = "timestamp is not a time"
NULL_ENTRY = "null item id in a list"
UNKNOWN_CLICK = "click on an item not in the catalogue"
NO_ITEM_ID = "empty item_id"
NO_TITLE = "empty title"
DUPLICATE_ITEM = "duplicate item_id"

ITEM_REASONS = (NO_ITEM_ID, NO_TITLE, DUPLICATE_ITEM)

_ZONE = r"\s+([+-]\d\d(?::?\d\d)?)$"
_TIME_FORMATS = ("%FT%T%.f%#z", "%FT%T%.f", "%FT%H:%M", "%F")


@dataclass(frozen=True)
class Checked:
    """Valid rows, rejected rows, and counts."""

    table: pa.Table
    quarantine: pa.Table
    counts: dict[str, int]
    unknown_ids: pa.Array
    """Distinct ids in the events' lists that are no items."""


def parse_times(column: pa.ChunkedArray, source: str) -> pa.ChunkedArray:
    """Parse times or ISO 8601 strings as timestamp[us, UTC]; bad strings become null.

    Times without a zone are UTC. Raises InputError for any other type, because an integer does
    not say whether it counts seconds, milliseconds or microseconds.
    """
    kind = column.type
    if pa.types.is_null(kind):
        return pa.chunked_array([pa.nulls(len(column), TIME)])
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        in_us = column if pa.types.is_timestamp(kind) else column.cast(pa.timestamp("ms"))
        zone = in_us.type.tz
        return in_us.cast(pa.timestamp("us", tz=zone), safe=False).cast(TIME)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        problem = "cannot be read as a time; write timestamp[us, UTC] or ISO 8601 strings"
        raise InputError(f"{source}: column timestamp", str(kind), problem)
    text = pl.Series("text", column.to_pylist(), dtype=pl.String).str.strip_chars()
    text = text.str.replace(r"^(\d{4}-\d\d-\d\d) ", "${1}T").str.replace(_ZONE, "${1}")
    text = text.str.replace(r"\s*(UTC|GMT)$", "Z")
    parsed = [
        pl.col("text").str.to_datetime(form, time_unit="us", strict=False) for form in _TIME_FORMATS
    ]
    zoned = [parsed[0], *(naive.dt.replace_time_zone("UTC") for naive in parsed[1:])]
    times = pl.DataFrame([text]).select(pl.coalesce(zoned)).to_series()
    return pa.chunked_array([times.to_arrow()]).cast(TIME)


def event_columns(table: pa.Table, source: str) -> pa.Table:
    """Return `table` with exactly the columns of EVENTS; raises InputError on wrong ones."""
    if "timestamp" in table.column_names:
        place = table.column_names.index("timestamp")
        times = parse_times(table.column("timestamp"), source)
        table = table.set_column(place, "timestamp", times)
    return check_columns(table, EVENTS, source).select(EVENTS.names)


def check_events(
    table: pa.Table, item_ids: pa.Array, source: str = "events", first_row: int = 0, order: int = 0,
    with_unclicked: bool = False,
) -> Checked:  # fmt: skip
    """Validate event rows against the catalogue's ids.

    `first_row` is the row number in `source` of the table's first row, and `order` its number in
    the whole input. The resulting table has the columns CLEAN_EVENTS and, unless `with_unclicked`,
    only pages with clicks.
    """
    rows = event_columns(table, source)
    item_ids = _named(rows, item_ids)
    lists = {name: _clean_list(rows.column(name), item_ids) for name in _LIST_COLUMNS}
    clicked = lists["clicked_item_ids"]
    faults = [
        (NO_USER, blank(rows.column("user_id"), MISSING)),
        (NO_TIME, _mask(pc.is_null(rows.column("timestamp")))),
        (NULL_ENTRY, np.logical_or.reduce([entry.had_null for entry in lists.values()])),
        (UNKNOWN_CLICK, clicked.num_unknown > 0),
    ]
    lost = faults[0][1] | faults[1][1]
    keep = ~lost & (with_unclicked | (clicked.num_kept > 0))
    clean = {name: rows.column(name) for name in EVENTS.names}
    clean.update({name: pa.chunked_array([entry.values]) for name, entry in lists.items()})
    clean["order"] = pa.chunked_array([np.arange(order, order + table.num_rows, dtype=np.int64)])
    counts = {
        "event_rows": table.num_rows,
        "pages_without_clicks": int((~lost & (clicked.num_given == 0)).sum()),
        "clicks_not_in_catalogue": int(clicked.num_unknown[~lost].sum()),
        "exposures_not_in_catalogue": int(lists["exposed_item_ids"].num_unknown[~lost].sum()),
    }
    kept = pa.table(clean, schema=CLEAN_EVENTS).filter(pa.array(keep))
    unknown = pc.unique(pa.concat_arrays([entry.unknown for entry in lists.values()]))
    return Checked(kept, _quarantine(table, faults, source, first_row), counts, unknown)


def check_items(table: pa.Table, source: str = "items", first_row: int = 0) -> Checked:
    """Validate item rows; keeps exactly the rows that `catalog.usable_items` selects."""
    usable = usable_items(table)
    faults = [
        (NO_ITEM_ID, blank(table.column("item_id"), MISSING)),
        (NO_TITLE, blank(table.column("title"))),
        (DUPLICATE_ITEM, ~usable),
    ]
    kept = table.filter(pa.array(usable))
    counts = {"item_rows": table.num_rows}
    none = pa.array([], pa.string())
    return Checked(kept, _quarantine(table, faults, source, first_row), counts, none)


def check_share(reasons: Mapping[str, int], rows: int, max_share: float, source: str) -> None:
    """Raise TooManyBadRows when more than `max_share` of `rows` were quarantined."""
    bad = sum(reasons.values())
    if rows and bad / rows > max_share:
        listed = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
        raise TooManyBadRows(
            f"{source}: {bad} of {rows} rows are bad ({listed}); "
            f"prepare.max_bad_share allows a share of {max_share:g}"
        )


def count_reasons(quarantine: pa.Table) -> dict[str, int]:
    """Count quarantined rows per reason, most frequent first."""
    return dict(Counter(quarantine.column("reason").to_pylist()).most_common())


def records_of(rows: pa.Table) -> list[str]:
    """Return rows as JSON text, as the quarantine keeps them."""
    return [json.dumps(record, default=_as_text, ensure_ascii=False) for record in rows.to_pylist()]


def blank(column: pa.ChunkedArray, words: Sequence[str] = ("",)) -> np.ndarray:
    """Return the mask [rows] of nulls and of strings equal to `words`, ignoring outer spaces."""
    missing = pa.array([None, *words], pa.string())
    return _mask(pc.is_in(pc.utf8_trim_whitespace(column), value_set=missing))


_LIST_COLUMNS = ("exposed_item_ids", "clicked_item_ids", "purchased_item_ids")


@dataclass(frozen=True)
class _CleanList:
    values: pa.Array
    had_null: np.ndarray
    num_given: np.ndarray
    num_unknown: np.ndarray
    num_kept: np.ndarray
    unknown: pa.Array


def _named(rows: pa.Table, item_ids: pa.Array) -> pa.Array:
    """Return the ids that `rows` name, or all, as `named_ids` does."""
    entries = [_one_array(rows.column(name)).flatten() for name in _LIST_COLUMNS]
    return named_ids(pa.chunked_array(entries, pa.string()), item_ids)


def named_ids(entries: pa.Array | pa.ChunkedArray, item_ids: pa.Array) -> pa.Array:
    """Return the ids that are entries, of a catalogue with more ids than there are entries.

    Otherwise all: entries are looked up in a hash table of the ids, which takes as much time and
    memory as there are ids.
    """
    if len(entries) >= len(item_ids):
        return item_ids
    return item_ids.filter(pc.is_in(item_ids, value_set=pc.unique(entries)))


def _clean_list(column: pa.ChunkedArray, item_ids: pa.Array) -> _CleanList:
    """Keep the catalogue's items in every list and count the others; a null list becomes empty."""
    lists = _one_array(column)
    lengths = _numpy(pc.fill_null(pc.list_value_length(lists), 0)).astype(np.int64)
    entries = lists.flatten()  # skips null lists, so it agrees with the lengths
    row = np.repeat(np.arange(len(lists)), lengths)
    null, known = _mask(pc.is_null(entries)), _mask(pc.is_in(entries, value_set=item_ids))
    num_kept = np.bincount(row[known], minlength=len(lists))
    offsets = np.concatenate([[0], np.cumsum(num_kept)]).astype(np.int32)
    values = pa.ListArray.from_arrays(pa.array(offsets), entries.filter(pa.array(known)))
    num_unknown = np.bincount(row[~known & ~null], minlength=len(lists))
    num_null = np.bincount(row[null], minlength=len(lists))
    unknown = entries.filter(pa.array(~known & ~null))
    return _CleanList(values, num_null > 0, lengths - num_null, num_unknown, num_kept, unknown)


def _quarantine(
    table: pa.Table, faults: list[tuple[str, np.ndarray]], source: str, first_row: int
) -> pa.Table:
    reason = np.full(table.num_rows, -1)
    for number, (_, mask) in reversed(list(enumerate(faults))):
        reason[mask] = number
    bad = np.flatnonzero(reason >= 0)
    columns = {
        "record": records_of(table.take(pa.array(bad))),
        "source_file": [source] * len(bad),
        "row": bad + first_row,
        "reason": [faults[number][0] for number in reason[bad]],
    }
    return pa.table(columns, schema=QUARANTINE)


def _as_text(value: object) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return whole.combine_chunks() if isinstance(whole, pa.ChunkedArray) else whole


def _numpy(array: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return np.asarray(array.to_numpy(zero_copy_only=False))


def _mask(array: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return _numpy(array).astype(bool)

"""Importer of any log with a row per exposure and any item table: writes events and items.

`columns` and `item_columns` map our names to columns of the files; a column that already has our
name needs no mapping.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import polars as pl

from karma_ray.data.identifiers import known_text
from karma_ray.data.importers.log_files import TextFormat, read_files
from karma_ray.data.importers.long_parsing import flag, timestamp
from karma_ray.data.importers.output import DataFolder
from karma_ray.errors import InputError

_REQUIRED = ("user_id", "item_id", "timestamp")
_OPTIONAL = ("query", "clicked", "purchased", "position", "impression_id", "session_id")
_ITEM_REQUIRED = ("item_id", "title")
_ITEM_OPTIONAL = ("text", "brand", "category", "image")
_NO_TIME = "unparsable timestamp"
_TIME_ADVICE = "--time-format states how times are written, for example %m/%d/%Y or %Y%m%d"
_IDS = ("user_id", "item_id", "impression_id", "session_id")
_NEARLY_ALL = 0.95
_NO_LOG_BEFORE = datetime(1980, 1, 1, tzinfo=UTC)
_ROWS_PER_PART = 1_000_000


def parse_mapping(text: str, field: str) -> dict[str, str]:
    """Parse `user_id=uid,item_id=sku` to {"user_id": "uid", ...}; raises InputError."""
    mapping: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, separator, column = part.partition("=")
        if not separator or not name.strip() or not column.strip():
            raise InputError(field, part, "does not have the form name=column")
        mapping[name.strip()] = column.strip()
    return mapping


def import_long(
    src: str,
    out: str,
    *,
    items: str | None,
    columns: Mapping[str, str] | None = None,
    item_columns: Mapping[str, str] | None = None,
    form: TextFormat | None = None,
    time_format: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Import the log `src` as events of `out`; returns the manifest.

    `src` and `items` are CSV, TSV, Parquet or JSON-lines files, or folders of one such kind. A
    page is an `impression_id` if there is one, else (user, timestamp, query). Rows that cannot be
    read are quarantined with their reason. `form` says how text files are read, and `time_format`
    (`%m/%d/%Y`) how times are written that `long_parsing.timestamp` does not know. Nothing is
    drawn at random, so `seed` has no effect. Raises InputError on files and columns that do not
    exist, and when no row can be read.
    """
    if not items:
        raise InputError("--items", items, "is needed: name the table of item ids and titles")
    form = form or TextFormat()
    form.check()
    columns, item_columns = columns or {}, item_columns or {}
    ids, needed = ([columns.get(n, n) for n in names] for names in (_IDS, _REQUIRED + _OPTIONAL))
    log_rows = read_files(src, "SRC", ids=ids, needed=needed, form=form)
    log = map_columns(log_rows.frame, columns, "--columns", _REQUIRED, _OPTIONAL)
    needed = [item_columns.get(name, name) for name in _ITEM_REQUIRED]
    item_rows = read_files(items, "--items", ids=needed[:1], needed=needed, form=form)
    table = map_columns(
        item_rows.frame, item_columns, "--item-columns", _ITEM_REQUIRED, _ITEM_OPTIONAL
    )
    if "image" in table.columns and table.schema["image"] != pl.Binary:
        raise InputError(
            "--item-columns image", table.schema["image"], "must contain the bytes of a picture"
        )
    with DataFolder(out) as data:
        for file, reason, lines in [*log_rows.rejected, *item_rows.rejected]:
            data.reject(lines, file, reason)
        known = _write_items(data, table)
        exposures = _readable(data, log, time_format)
        if exposures.is_empty():
            advice = f"; {_TIME_ADVICE}" if data.quarantined[_NO_TIME] else ""
            found = f"has no row that can be read: {dict(data.quarantined)}{advice}"
            raise InputError("SRC", src, found)
        pages = fold_exposures(exposures)
        for part in pages.iter_slices(_ROWS_PER_PART):
            data.add("events", part)
        notes = [*log_rows.notes, *item_rows.notes, *_page_notes(log.columns, pages)]
        return _finish(data, log.columns, exposures, known, notes)


def _finish(
    data: DataFolder, names: list[str], exposures: pl.DataFrame, known: set[str], read: list[str]
) -> dict[str, Any]:
    clicks = exposures.filter("clicked")
    unknown = clicks.height - int(clicks["item_id"].is_in(known).sum())
    page = "impression_id" if "impression_id" in names else "(user, timestamp, query)"
    notes = [f"one page per {page}", *read]
    if "clicked" not in names:
        notes.append("the log has no clicked column: every row is a click, negatives are unknown")
    if count := data.quarantined[_NO_TIME]:
        notes.append(f"{count} timestamps cannot be read; {_TIME_ADVICE}")
    if exposures["timestamp"].max() < _NO_LOG_BEFORE:  # type: ignore[operator]
        notes.append(f"all times lie before 1980, as row numbers do; {_TIME_ADVICE}")
    if unknown:
        notes.append(f"{unknown} clicks name items without a row in the item table")
    return data.finish(
        name="long",
        query_source="real" if "query" in names else "none",
        negative_source="exposed" if data.num_pages_with_negatives else "none",
        licence="yours",
        notes=notes,
    )


def _page_notes(names: list[str], pages: pl.DataFrame) -> list[str]:
    """Give advice if nearly every page is one row of the log, and hence has no negative."""
    single = int((pages["exposed_item_ids"].list.len() == 1).sum())
    if "clicked" not in names or single < _NEARLY_ALL * pages.height:
        return []
    told = f"{single} of {pages.height} pages have one item, so nothing was shown beside it"
    if "impression_id" in names:
        return [f"{told}: does impression_id name a result page, or a row?"]
    return [f"{told}: name the column of the result page with --columns impression_id=COLUMN"]


def map_columns(
    frame: pl.DataFrame,
    mapping: Mapping[str, str],
    field: str,
    required: Iterable[str],
    optional: Iterable[str],
) -> pl.DataFrame:
    """Rename mapped columns to our names; raises InputError on columns that do not exist."""
    ours = [*required, *optional]
    have = [c for c in frame.columns if c not in ("row", "source_file")]
    for name, column in mapping.items():
        if name not in ours:
            raise InputError(field, name, "is not one of our column names", choices=ours)
        if column not in have:
            raise InputError(f"{field} {name}", column, "is not a column of the file", have)
    for name in {*ours} & {*have} | {*mapping}:
        kind = frame.schema[mapping.get(name, name)]
        if kind.is_nested():
            raise InputError(f"{field} {name}", str(kind), "is not a single value")
    for name in required:
        if name not in mapping and name not in have:
            raise InputError(f"{field} {name}", None, "is needed; columns of the file", have)
    # A mapped column replaces another one that already has our name.
    hidden = [name for name, column in mapping.items() if name in have and column != name]
    taken = [pl.col(column).alias(name) for name, column in mapping.items()]
    rest = [c for c in frame.columns if c not in mapping.values() and c not in hidden]
    return frame.select(*taken, *rest)


def _write_items(data: DataFolder, table: pl.DataFrame) -> set[str]:
    texts = [name for name in ("title", "text", "brand", "category") if name in table.columns]
    table = table.with_columns(known_text(name) for name in texts)
    reasons = {
        "item without id": pl.col("item_id").is_null(),
        "item without title": pl.col("title").is_null(),
        "repeated item id": ~pl.col("item_id").is_first_distinct(),
    }
    kept = _filter(data, table, reasons)
    if kept.is_empty():
        raise InputError("--items", 0, "items with an id and a title: the catalogue is empty")
    data.add("items", kept.drop("row", "source_file"))
    return set(kept["item_id"])


def _readable(data: DataFolder, log: pl.DataFrame, time_format: str | None) -> pl.DataFrame:
    """Return parsed exposures; rows that cannot be parsed are quarantined unchanged."""
    schema = log.schema
    parsed = [pl.col(name).alias(f"_{name}") for name in _IDS if name in schema]
    if "query" in schema:
        parsed.append(known_text("query").alias("_query"))
    parsed += [timestamp("timestamp", schema["timestamp"], time_format).alias("_timestamp")]
    for name in ("clicked", "purchased"):
        if name in schema:
            parsed.append(flag(name, schema[name]).alias(f"_{name}"))
    if "position" in schema:
        parsed.append(
            pl.col("position").cast(pl.Float64, strict=False).fill_nan(None).alias("_position")
        )
    reasons = {
        "null user": pl.col("_user_id").is_null(),
        "null item": pl.col("_item_id").is_null(),
        _NO_TIME: pl.col("_timestamp").is_null(),
    }
    for name in ("clicked", "purchased"):
        if name in schema:
            reasons[f"unparsable {name}"] = pl.col(f"_{name}").is_null()
    kept = _filter(data, log.with_columns(parsed), reasons)
    names = [name for name in kept.columns if name.startswith("_")]
    frame = kept.select(pl.col(name).alias(name[1:]) for name in names if name[1:] in schema)
    if "clicked" not in frame.columns:
        frame = frame.with_columns(pl.lit(True).alias("clicked"))
    return frame


def _filter(data: DataFolder, frame: pl.DataFrame, reasons: dict[str, pl.Expr]) -> pl.DataFrame:
    for reason, bad in reasons.items():
        rejected = frame.filter(bad)
        shown = [c for c in frame.columns if c != "image" and not c.startswith("_")]
        for (file,), rows in rejected.group_by(["source_file"], maintain_order=True):
            data.reject(rows.select(shown).drop("source_file"), str(file), reason)
        frame = frame.filter(~bad)
    return frame


def fold_exposures(exposures: pl.DataFrame) -> pl.DataFrame:
    """Build EVENTS: one row per page in time order, with items by position or in row order.

    An item that is shown twice on a page counts once, as clicked if any of its rows is.
    """
    names = exposures.columns
    page = ["user_id", *(c for c in ("timestamp", "query") if c in names)]
    if "impression_id" in names:
        # Rows without an impression id are grouped by time and query.
        fallback = [pl.when(pl.col("impression_id").is_null()).then(pl.col(c)) for c in page[1:]]
        keys = [f"page_{c}" for c in page[1:]]
        exposures = exposures.with_columns(
            key.alias(name) for key, name in zip(fallback, keys, strict=True)
        )
        page = ["user_id", "impression_id", *keys]
    order = ["position"] if "position" in names else []
    ordered = exposures.sort(["timestamp", *order], maintain_order=True, nulls_last=True)
    item = pl.col("item_id")
    aggregates = [
        item.unique(maintain_order=True).alias("exposed_item_ids"),
        item.filter(pl.col("clicked")).unique(maintain_order=True).alias("clicked_item_ids"),
    ]
    if "purchased" in names:
        bought = item.filter(pl.col("purchased")).unique(maintain_order=True)
        aggregates.append(bought.alias("purchased_item_ids"))
    aggregates += [
        pl.col(c).drop_nulls().first()
        for c in ("timestamp", "query", "session_id")
        if c in names and c not in page
    ]
    pages = ordered.group_by(page, maintain_order=True).agg(aggregates)
    pages = pages.drop(c for c in page if c.startswith("page_") or c == "impression_id")
    if "session_id" not in pages.columns:
        pages = pages.with_columns(pl.lit(None, pl.String).alias("session_id"))
    return pages.sort("timestamp", maintain_order=True)

"""Importer of any log with a row per exposure and any item table: writes events and items.

`columns` and `item_columns` map our names to columns of the files; a column that already has our
name needs no mapping.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from karma_ray.artifacts import absolute, open_filesystem, value_hash
from karma_ray.data.identifiers import known_text
from karma_ray.data.importers.exposures import (
    NO_TIME,
    OPTIONAL,
    TIME_ADVICE,
    Exposures,
    filter_rows,
    map_columns,
)
from karma_ray.data.importers.log_files import TextFormat, read_files
from karma_ray.data.importers.output import DataFolder
from karma_ray.data.importers.page_spool import TIME_US, PageSpool
from karma_ray.data.importers.text_blocks import BLOCK_BYTES
from karma_ray.data.picture_files import beside
from karma_ray.errors import InputError
from karma_ray.node_disk import node_folder

_ITEM_REQUIRED = ("item_id", "title")
_ITEM_OPTIONAL = ("text", "brand", "category", "image")
_MAX_TEXT = 1_000_000
"""Characters of a text: models read some dozens of tokens, and a longer one is no text."""
_NEARLY_ALL = 0.95
_NO_LOG_BEFORE = datetime(1980, 1, 1, tzinfo=UTC)


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
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, Any]:
    """Import the log `src` as events of `out`; returns the manifest.

    `src` and `items` are CSV, TSV, Parquet or JSON-lines files, or folders of one such kind. A
    page is an `impression_id` of a user if there is one, else (user, timestamp, query); its rows
    may lie anywhere in the log, of which `block_bytes` are in memory at a time. Rows that cannot be
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
    needed = [item_columns.get(name, name) for name in _ITEM_REQUIRED]
    item_rows = read_files(items, "--items", ids=needed[:1], needed=needed, form=form)
    table = map_columns(
        item_rows.frame, item_columns, "--item-columns", _ITEM_REQUIRED, _ITEM_OPTIONAL
    )
    table = _with_full_names(table, items)
    log = Exposures(src, columns, form, time_format, block_bytes)
    with DataFolder(out, count_users=False) as data:
        for file, reason, lines in item_rows.rejected:
            data.reject(lines, file, reason)
        known = _write_items(data, table)
        with _spool_folder(data) as folder:
            spool = PageSpool(folder, log.num_bytes)
            for exposures, rejected in log.batches():
                data.quarantine(rejected)
                spool.add(exposures)
            if not log.num_rows:
                advice = f"; {TIME_ADVICE}" if data.quarantined[NO_TIME] else ""
                found = f"has no row that can be read: {dict(data.quarantined)}{advice}"
                raise InputError("SRC", src, found)
            folded = _Folding(log.names, known, by_row=log.by_row)
            for part in spool.pages(folded):
                data.append("events", part)
        return _finish(data, log, folded, item_rows.notes)


class _Folding:
    """Folds buckets of exposures to pages, and counts what the manifest tells of them."""

    def __init__(self, names: Collection[str], known: pl.Series, *, by_row: bool) -> None:
        self._names, self._known, self._by_row = names, known, by_row
        self.users = self.pages = self.single = self.unknown = 0

    def __call__(self, exposures: pl.DataFrame) -> pl.DataFrame:
        """Return the pages of whole users; columns that the log lacks are all null."""
        optional = [name for name in OPTIONAL if name not in self._names]
        exposures = exposures.drop(optional)
        if self._by_row:
            number = pl.int_range(1, pl.len() + 1).over("user_id") * 1_000_000
            exposures = exposures.with_columns(number.cast(TIME_US).alias("timestamp"))
        clicked = pl.col("clicked").fill_null(False) if "clicked" in self._names else pl.lit(True)
        exposures = exposures.with_columns(clicked.alias("clicked"))
        if "purchased" in self._names:
            exposures = exposures.with_columns(pl.col("purchased").fill_null(False))
        clicks = exposures.filter("clicked")["item_id"]
        self.unknown += len(clicks) - int(clicks.is_in(self._known.implode()).sum())
        pages = fold_exposures(exposures)
        self.users += pages["user_id"].n_unique()
        self.pages += pages.height
        self.single += int((pages["exposed_item_ids"].list.len() == 1).sum())
        return pages


@contextmanager
def _spool_folder(data: DataFolder) -> Iterator[Path]:
    """Return a folder for files that only this import reads: in its work folder if it is local."""
    place = node_folder() if "://" in data.uri else Path(data.work)
    folder = place / f"spool-{value_hash(data.uri)}"
    shutil.rmtree(folder, ignore_errors=True)  # of an import that was killed
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _finish(
    data: DataFolder, log: Exposures, folded: _Folding, of_items: list[str]
) -> dict[str, Any]:
    names = log.names
    page = "impression_id" if "impression_id" in names else "(user, timestamp, query)"
    notes = [f"one page per {page}", *log.notes, *of_items, *_page_notes(names, folded)]
    if "clicked" not in names:
        notes.append("the log has no clicked column: every row is a click, negatives are unknown")
    if count := data.quarantined[NO_TIME]:
        notes.append(f"{count} timestamps cannot be read; {TIME_ADVICE}")
    if log.by_row:
        notes.append(
            "times are UNKNOWN: the rows of each user are numbered, one second apart after 1970, "
            "so a time compares rows of one user only, and the split takes the last rows of the "
            "users with most rows"
        )
    elif log.newest is not None and log.newest < _NO_LOG_BEFORE:
        notes.append(f"all times lie before 1980, as row numbers do; {TIME_ADVICE}")
    if folded.unknown:
        notes.append(f"{folded.unknown} clicks name items without a row in the item table")
    data.flush()
    return data.finish(
        name="long",
        query_source="real" if "query" in names else "none",
        negative_source="exposed" if data.num_pages_with_negatives else "none",
        licence="yours",
        notes=notes,
        num_users=folded.users,
    )


def _page_notes(names: Collection[str], folded: _Folding) -> list[str]:
    """Give advice if nearly every page is one row of the log, and hence has no negative."""
    single, pages = folded.single, folded.pages
    if "clicked" not in names or single < _NEARLY_ALL * pages:
        return []
    told = f"{single} of {pages} pages have one item, so nothing was shown beside it"
    if "impression_id" in names:
        return [f"{told}: does impression_id name a result page, or a row?"]
    return [f"{told}: name the column of the result page with --columns impression_id=COLUMN"]


def _with_full_names(table: pl.DataFrame, items: str) -> pl.DataFrame:
    """Let names of picture files start at the root instead of beside `items`."""
    kind = table.schema.get("image", pl.Binary)
    if kind == pl.Binary:
        return table
    if kind not in (pl.String, pl.Categorical, pl.Null):
        problem = "must contain the bytes of a picture, or text that names its file"
        raise InputError("--item-columns image", kind, problem)
    fs, path = open_filesystem(items)
    base = absolute(items) if fs.isdir(path) else beside(items)
    name = known_text("image")
    whole = name.str.contains("://", literal=True) | name.str.starts_with("/")
    full = pl.when(whole).then(name).otherwise(pl.lit(f"{base}/") + name)
    return table.with_columns(full.alias("image"))


def _write_items(data: DataFolder, table: pl.DataFrame) -> pl.Series:
    texts = [name for name in ("title", "text", "brand", "category") if name in table.columns]
    table = table.with_columns(known_text(name) for name in texts)
    reasons = {
        "item without id": pl.col("item_id").is_null(),
        "item without title": pl.col("title").is_null(),
        "repeated item id": ~pl.col("item_id").is_first_distinct(),
        f"text of more than {_MAX_TEXT} characters": pl.any_horizontal(
            pl.col(texts).str.len_chars() > _MAX_TEXT
        ),
    }
    kept, rejected = filter_rows(table, reasons)
    data.quarantine(rejected)
    if kept.is_empty():
        raise InputError("--items", 0, "items with an id and a title: the catalogue is empty")
    data.add("items", kept.drop("row", "source_file"))
    return kept["item_id"]


def fold_exposures(exposures: pl.DataFrame) -> pl.DataFrame:
    """Build EVENTS of exposures in the order of the log, one row per page, in any order.

    Items are ordered by position, or as the rows are. An item that is shown twice on a page counts
    once, as clicked if any of its rows is. `timestamp`, `position` and `order` are those of the
    first row.
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
    order = ["timestamp", *(["position"] if "position" in names else []), "order"]
    ordered = exposures.sort(order, nulls_last=True)
    if "position" not in names:
        ordered = ordered.with_columns(pl.lit(None, pl.Float64).alias("position"))
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
    aggregates += [pl.col(c).first() for c in ("position", "order")]
    pages = ordered.group_by(page, maintain_order=True).agg(aggregates)
    pages = pages.drop(c for c in page if c.startswith("page_") or c == "impression_id")
    if "session_id" not in pages.columns:
        pages = pages.with_columns(pl.lit(None, pl.String).alias("session_id"))
    return pages

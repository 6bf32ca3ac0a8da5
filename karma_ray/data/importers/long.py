"""Importer of any log with a row per exposure and any item table: writes events and items.

`columns` and `item_columns` map our names to columns of the files; a column that already has our
name needs no mapping.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

import polars as pl

from karma_ray.artifacts import absolute, join, open_filesystem
from karma_ray.data.identifiers import known_text
from karma_ray.data.importers.exposures import (
    NO_TIME,
    TIME_ADVICE,
    Exposures,
    LogFacts,
    filter_rows,
    map_columns,
)
from karma_ray.data.importers.import_work import ImportSizes, ImportWork
from karma_ray.data.importers.log_files import TextFormat, read_files
from karma_ray.data.importers.log_import import LogImport
from karma_ray.data.importers.output import DataFolder
from karma_ray.data.importers.page_folding import PageCounts
from karma_ray.data.picture_files import beside
from karma_ray.data.splits import to_microseconds
from karma_ray.data.tasks import RunTasks, run_here
from karma_ray.data.work_folder import remove_work
from karma_ray.errors import InputError

_LOG = "log"
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
    sizes: ImportSizes | None = None,
    run: RunTasks = run_here,
) -> dict[str, Any]:
    """Import the log `src` as events of `out`; returns the manifest.

    `src` and `items` are CSV, TSV, Parquet or JSON-lines files, or folders of one such kind. A
    page is an `impression_id` of a user if there is one, else (user, timestamp, query); its rows
    may lie anywhere in the log, of which the tasks that `run` runs hold a part each
    (log_passes.py). Rows that cannot be read are quarantined with their reason. `form` says how
    text files are read, and `time_format` (`%m/%d/%Y`) how times are written that
    `long_parsing.timestamp` does not know. Nothing is drawn at random, so `seed` has no effect.
    Raises InputError on files and columns that do not exist, and when no row can be read.
    """
    if not items:
        raise InputError("--items", items, "is needed: name the table of item ids and titles")
    form, sizes = form or TextFormat(), sizes or ImportSizes()
    form.check()
    columns, item_columns = columns or {}, item_columns or {}
    needed = [item_columns.get(name, name) for name in _ITEM_REQUIRED]
    item_rows = read_files(items, "--items", ids=needed[:1], needed=needed, form=form)
    table = map_columns(
        item_rows.frame, item_columns, "--item-columns", _ITEM_REQUIRED, _ITEM_OPTIONAL
    )
    table = _with_full_names(table, items)
    log = Exposures(src, columns, form, time_format, sizes.block_bytes)
    with DataFolder(absolute(out), count_users=False, goes_on_with=(_LOG, "events")) as data:
        for file, reason, lines in item_rows.rejected:
            data.reject(lines, file, reason)
        _write_items(data, table)
        work = ImportWork(join(data.work, _LOG))
        work.open(log.key())
        passes = LogImport(log, data, work, sizes, run)
        facts, of_files = passes.read()
        if not facts.num_rows:
            advice = f"; {TIME_ADVICE}" if data.quarantined[NO_TIME] else ""
            found = f"has no row that can be read: {dict(data.quarantined)}{advice}"
            raise InputError("SRC", src, found)
        folded = passes.fold(facts, of_files)
        remove_work(work.uri)
        return _finish(data, log, facts, folded, item_rows.notes)


def _finish(
    data: DataFolder, log: Exposures, facts: LogFacts, folded: PageCounts, of_items: list[str]
) -> dict[str, Any]:
    names = facts.names
    page = "impression_id" if "impression_id" in names else "(user, timestamp, query)"
    notes = [f"one page per {page}", *facts.notes, *of_items, *_page_notes(names, folded)]
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
    elif facts.newest is not None and facts.newest < to_microseconds(_NO_LOG_BEFORE, "time"):
        notes.append(f"all times lie before 1980, as row numbers do; {TIME_ADVICE}")
    if folded.unknown:
        notes.append(f"{folded.unknown} clicks name items without a row in the item table")
    return data.finish(
        name="long",
        query_source="real" if "query" in names else "none",
        negative_source="exposed" if data.num_pages_with_negatives else "none",
        licence="yours",
        notes=notes,
        num_users=folded.users,
    )


def _page_notes(names: Collection[str], folded: PageCounts) -> list[str]:
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


def _write_items(data: DataFolder, table: pl.DataFrame) -> None:
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

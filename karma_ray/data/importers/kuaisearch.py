"""Importer of KuaiSearch: real queries, readable titles, impressions, clicks and purchases."""

from __future__ import annotations

from typing import Any

import polars as pl

from karma_ray.data.identifiers import one_id
from karma_ray.data.importers.output import DataFolder
from karma_ray.data.importers.source import find_file, stream_json

_ITEM_KEYS = ("item_id", "item_title", "brand_name", "category_level1_name")
_PAGE_KEYS = (
    "user_id", "query", "time_index", "impressed_item_ids", "clicked_item_ids",
    "purchased_item_ids",
)  # fmt: skip
_LISTS = {"exposed": "impressed_item_ids", "clicked": "clicked_item_ids"}
_NAMELESS = frozenset({"", "unknown", "无品牌", "其他", "其他/other", "other"})
_ROWS_PER_PART = 20_000


def import_kuaisearch(src: str, out: str, *, seed: int = 0) -> dict[str, Any]:
    """Write the data folder of the KuaiSearch files in `src`; returns its manifest.

    Nothing is drawn at random, so `seed` has no effect.
    """
    items_file, pages_file = find_file(src, "items.jsonl"), find_file(src, "recall.jsonl")
    _check_first(items_file, _ITEM_KEYS)
    _check_first(pages_file, _PAGE_KEYS)
    with DataFolder(out) as data:
        known = _write_items(data, items_file)
        lost = _write_pages(data, pages_file, known)
        return data.finish(
            name="kuaisearch",
            query_source="real",
            negative_source="exposed",
            licence="demo rows: demonstration only, not for quantitative evaluation",
            notes=[
                "time_index is read as an order only: timestamps are that number in seconds after "
                "1970-01-01, so their distances may mean nothing",
                f"items without a title row were left out: {lost['exposed']} impressions and "
                f"{lost['clicked']} clicks of them; {lost['pages']} pages held no other item",
                "the source's own split column is not used",
            ],
        )


def _check_first(file: str, keys: tuple[str, ...]) -> None:
    next(stream_json(file, keys), None)


def _text(value: object) -> str | None:
    text = " ".join(str(value or "").split())
    return None if text.lower() in _NAMELESS else text


def _ids(record: dict[str, Any], name: str, file: str) -> list[str]:
    ids = (one_id(value, f"{file}: {name}") for value in record.get(name) or [])
    return [item_id for item_id in ids if item_id is not None]


def _reject(data: DataFolder, file: str, row: int, line: str, reason: str) -> None:
    data.reject(pl.DataFrame({"row": [row], "line": [line]}), file, reason)


def _write_items(data: DataFolder, file: str) -> set[str]:
    known: set[str] = set()
    part: list[dict[str, str | None]] = []
    schema = ("item_id", "title", "text", "brand", "category")

    def flush() -> None:
        data.add("items", pl.DataFrame(part, schema=dict.fromkeys(schema, pl.String)))
        part.clear()

    for row, line, record in stream_json(file, _ITEM_KEYS):
        item_id = one_id(record.get("item_id"), f"{file}: item_id") if record else None
        title = _text(record.get("item_title")) if record else None
        if record is None or not item_id or title is None or item_id in known:
            reason = "repeated item id" if item_id in known else "item without id or title"
            _reject(data, file, row, line, "not a JSON object" if record is None else reason)
            continue
        known.add(item_id)
        levels = (_text(record.get(f"category_level{level}_name")) for level in (1, 2, 3))
        part.append(
            {
                "item_id": item_id,
                "title": title,
                "text": None,
                "brand": _text(record.get("brand_name")),
                "category": " > ".join(level for level in levels if level) or None,
            }
        )
        if len(part) == _ROWS_PER_PART:
            flush()
    flush()
    return known


def _write_pages(data: DataFolder, file: str, known: set[str]) -> dict[str, int]:
    """Write the pages; returns how many exposures, clicks and pages were left out."""
    lost = {"exposed": 0, "clicked": 0, "pages": 0}
    part: list[dict[str, Any]] = []

    def flush() -> None:
        data.add("events", _events(part))
        part.clear()

    for row, line, record in stream_json(file, _PAGE_KEYS):
        reason = _problem(record)
        if record is None or reason:
            _reject(data, file, row, line, reason or "not a JSON object")
            continue
        page = {name: _ids(record, name, file) for name in _PAGE_KEYS[3:]}
        kept = {name: [i for i in ids if i in known] for name, ids in page.items()}
        for key, name in _LISTS.items():
            lost[key] += len(page[name]) - len(kept[name])
        if not kept["impressed_item_ids"] and not kept["clicked_item_ids"]:
            lost["pages"] += 1
            continue
        part.append(
            {
                "user_id": one_id(record["user_id"], f"{file}: user_id"),
                "timestamp": int(record["time_index"]),
                "query": _text(record.get("query")),
                "exposed_item_ids": kept["impressed_item_ids"],
                "clicked_item_ids": kept["clicked_item_ids"],
                "purchased_item_ids": kept["purchased_item_ids"],
                "session_id": one_id(record.get("session_id"), f"{file}: session_id"),
            }
        )
        if len(part) == _ROWS_PER_PART:
            flush()
    flush()
    return lost


def _problem(record: dict[str, Any] | None) -> str | None:
    if record is None:
        return "not a JSON object"
    if one_id(record.get("user_id"), "user_id") is None:
        return "null user"
    if not isinstance(record.get("time_index"), int):
        return "time_index is not a whole number"
    if any(not isinstance(record.get(name) or [], list) for name in _PAGE_KEYS[3:]):
        return "items are not a list"
    return None


def _events(rows: list[dict[str, Any]]) -> pl.DataFrame:
    strings = pl.List(pl.String)
    schema: dict[str, pl.DataType | type[pl.DataType]] = {
        "user_id": pl.String, "timestamp": pl.Int64, "query": pl.String,
        "exposed_item_ids": strings, "clicked_item_ids": strings, "purchased_item_ids": strings,
        "session_id": pl.String,
    }  # fmt: skip
    frame = pl.DataFrame(rows, schema=schema)
    seconds = pl.from_epoch(pl.col("timestamp"), "s").cast(pl.Datetime("us"))
    return frame.with_columns(seconds.dt.replace_time_zone("UTC").alias("timestamp"))

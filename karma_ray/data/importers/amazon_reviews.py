"""Importer of one or several categories of Amazon Reviews 2023: reviews as clicks, no queries.

`SRC` holds `CATEGORY.jsonl` (reviews) and `meta_CATEGORY.jsonl` (products), each perhaps `.gz`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import polars as pl

from karma_ray.artifacts import data_files, exists, open_filesystem
from karma_ray.data.identifiers import known_text
from karma_ray.data.importers.output import DataFolder
from karma_ray.data.importers.text_blocks import NOT_UTF8, stream_blocks
from karma_ray.errors import InputError

_ENDINGS = (".jsonl", ".jsonl.gz")
_META = "meta_"
_REVIEW = ("user_id", "parent_asin", "timestamp", "rating", "verified_purchase")
_PRODUCT = ("parent_asin", "title", "description", "features", "store", "categories")
_NO_OBJECT = "not a JSON object"


def import_amazon_reviews(src: str, out: str, *, seed: int = 0) -> dict[str, Any]:
    """Write the data folder of the files in `src`; returns its manifest.

    Nothing is drawn at random, so `seed` has no effect.
    """
    reviews, products = _find(src)
    with DataFolder(out) as data:
        known = _write_items(data, products)
        data.flush()  # clicks on products without a row are counted from now on
        _write_events(data, reviews, known)
        names = ", ".join(_category(file) for file in reviews)
        return data.finish(
            name="amazon_reviews_2023",
            query_source="none",
            negative_source="none",
            licence="Amazon review data: research use",
            notes=[
                f"categories: {names}",
                "every review is a click, whatever its rating: one page per review, without query "
                "or exposures, so gAUC has no groups and is not reported",
                "a click with verified_purchase is a purchase; others may be opinions on something "
                "bought elsewhere",
                "items are parent_asin: asin names a colour or size, which the products lack",
                "times are milliseconds (UTC) of the review, days or weeks after the purchase: an "
                "order of opinions, not of visits. Users who review several things at once do so "
                "within minutes",
                "reviews are of all dates; a split by time has many items that are new",
                "pictures are URLs and are not fetched",
            ],
        )


def _find(src: str) -> tuple[list[str], list[str]]:
    """Return the files of reviews and of products, by category; raises InputError."""
    if not exists(src):
        raise InputError("SRC", src, "does not exist")
    fs, _ = open_filesystem(src)
    files = [str(fs.unstrip_protocol(file)) for file in data_files(src, _ENDINGS)]
    products = {_category(f): f for f in files if _base(f).startswith(_META)}
    reviews = {_category(f): f for f in files if not _base(f).startswith(_META)}
    if not reviews:
        raise InputError("SRC", src, "holds no file of reviews", choices=["CATEGORY.jsonl[.gz]"])
    for category in reviews:
        if category not in products:
            expected = [f"{_META}{category}{ending}" for ending in _ENDINGS]
            raise InputError("SRC", src, "does not hold the expected file", choices=expected)
    return list(reviews.values()), [products[category] for category in reviews]


def _base(file: str) -> str:
    return file.rsplit("/", 1)[-1]


def _category(file: str) -> str:
    return _base(file).removesuffix(".gz").removesuffix(".jsonl").removeprefix(_META)


def _records(data: DataFolder, file: str, names: tuple[str, ...]) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of each block, with `row`; lines that are no objects are quarantined."""
    for block in stream_blocks(file):
        data.reject(block.bad, file, NOT_UTF8)
        records: list[dict[str, Any]] = []
        bad: list[tuple[int, str]] = []
        for row, line in enumerate(block.lines, block.first):
            if not line or not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                records.append({name: record.get(name) for name in names} | {"row": row})
            else:
                bad.append((row, line))
        data.reject(pl.DataFrame(bad, ["row", "line"], orient="row"), file, _NO_OBJECT)
        yield records


def _joined(value: object) -> str | None:
    """Join a list of texts, as descriptions and features are."""
    parts = value if isinstance(value, list) else [value]
    return " ".join(str(part).strip() for part in parts if part) or None


def _write_items(data: DataFolder, files: list[str]) -> pl.Series:
    known = pl.Series("item_id", [], pl.String)
    strings = dict.fromkeys(("item_id", "title", "text", "brand", "category"), pl.String)
    for file in files:
        for records in _records(data, file, _PRODUCT):
            rows = pl.DataFrame(
                [
                    {
                        "row": record["row"],
                        "item_id": record["parent_asin"],
                        "title": record["title"],
                        "text": _joined([_joined(record["features"]),
                                         _joined(record["description"])]),
                        "brand": record["store"],
                        "category": " > ".join(map(str, record["categories"] or [])) or None,
                    }
                    for record in records
                ],
                {"row": pl.Int64, **strings},
                strict=False,
            ).with_columns(known_text(name) for name in ("item_id", "title", "brand"))  # fmt: skip
            reasons = {
                "item without id": pl.col("item_id").is_null(),
                "item without title": pl.col("title").is_null(),
                "repeated item id": pl.col("item_id").is_in(known.implode())
                | ~pl.col("item_id").is_first_distinct(),
            }
            rows = _filter(data, rows, file, reasons)
            known = pl.concat([known, rows["item_id"]])
            image = pl.lit(None, pl.Binary).alias("image")
            data.append("items", rows.drop("row").with_columns(image))
    return known


def _write_events(data: DataFolder, files: list[str], known: pl.Series) -> None:
    strings, page = pl.List(pl.String), "clicked_item_ids"
    schema = {"user_id": pl.String, "parent_asin": pl.String, "timestamp": pl.Int64}
    for file in files:
        for records in _records(data, file, _REVIEW):
            rows = pl.DataFrame(
                records,
                {"row": pl.Int64, **schema, "rating": pl.Float64, "verified_purchase": pl.Boolean},
                strict=False,
            ).with_columns(known_text("user_id"), known_text("parent_asin"))
            reasons = {
                "null user": pl.col("user_id").is_null(),
                "null item": pl.col("parent_asin").is_null(),
                "unparsable timestamp": pl.col("timestamp").is_null(),
                "item not in the catalogue": ~pl.col("parent_asin").is_in(known.implode()),
            }
            rows = _filter(data, rows, file, reasons)
            bought = pl.col("verified_purchase").fill_null(False)
            none = pl.lit(None, pl.String)
            item = pl.concat_list("parent_asin")
            data.append(
                "events",
                rows.select(
                    "user_id",
                    pl.from_epoch("timestamp", "ms").cast(pl.Datetime("us", "UTC")),
                    none.alias("query"),
                    pl.lit([], strings).alias("exposed_item_ids"),
                    item.alias(page),
                    pl.when(bought).then(item).otherwise(pl.lit([], strings))
                    .alias("purchased_item_ids"),
                    none.alias("session_id"),
                ),
            )  # fmt: skip


def _filter(
    data: DataFolder, rows: pl.DataFrame, file: str, reasons: dict[str, pl.Expr]
) -> pl.DataFrame:
    for reason, bad in reasons.items():
        data.reject(rows.filter(bad), file, reason)
        rows = rows.filter(~bad)
    return rows

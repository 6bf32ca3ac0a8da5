"""Importer of Retailrocket: views, carts and purchases of a shop whose words are all hashed.

`SRC` holds `events.csv`, `item_properties_part1.csv`, `item_properties_part2.csv` and
`category_tree.csv`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl

from karma_ray.data.importers.log_files import TextFormat, read_files
from karma_ray.data.importers.output import DataFolder
from karma_ray.data.importers.source import check_names, find_file
from karma_ray.data.importers.text_blocks import NOT_UTF8, stream_blocks

_EVENTS = ("timestamp", "visitorid", "event", "itemid", "transactionid")
_PROPERTIES = ("timestamp", "itemid", "property", "value")
_TREE = ("categoryid", "parentid")
_KINDS = ("view", "addtocart", "transaction")
_VISIT = 30 * 60 * 1000
"""Milliseconds without an event after which a visit ends."""
_MAX_DEPTH = 20


def import_retailrocket(src: str, out: str, *, seed: int = 0) -> dict[str, Any]:
    """Write the data folder of the Retailrocket files in `src`; returns its manifest.

    Nothing is drawn at random, so `seed` has no effect.
    """
    events = find_file(src, "events.csv")
    properties = [find_file(src, f"item_properties_part{part}.csv") for part in (1, 2)]
    tree = find_file(src, "category_tree.csv")
    with DataFolder(out) as data:
        items = _items(data, properties, _paths(data, tree))
        data.add("items", items)
        rows = _readable(data, events, items["item_id"])
        pages = fold_visits(rows)
        data.append("events", pages)
        return data.finish(
            name="retailrocket",
            query_source="none",
            negative_source="none",
            licence="CC BY-NC-SA 4.0",
            notes=[
                "all words are hashed: a title is the item's category path and its text are the "
                "hashed values of its properties, so no pretrained language model can read it",
                "properties change weekly: the first value of each counts, as later ones are of "
                "the time of the test; `available` is left out",
                "views, carts and transactions all count as clicks; events of one visitor on one "
                "item, with no other item and less than half an hour between them, are one page, "
                "purchased if one of them is a transaction",
                f"{rows.height - pages.height} events were folded into the page before them",
                "nothing is known of what was shown and not viewed: no negatives, no queries",
                "a visit (session) ends after half an hour without an event; most visitors have "
                "one event. Times are milliseconds in UTC",
            ],
        )


def _table(data: DataFolder, file: str, names: tuple[str, ...]) -> pl.DataFrame:
    read = read_files(file, "SRC", form=TextFormat("text"))
    for name, reason, lines in read.rejected:
        data.reject(lines, name, reason)
    check_names(read.frame.columns, names, file)
    return read.frame


def _paths(data: DataFolder, file: str) -> pl.DataFrame:
    """Return `category` and its `path` from the root, such as `c1 > c27 > c9`."""
    parent = dict(_table(data, file, _TREE).select(_TREE).iter_rows())

    def path(category: str) -> str:
        steps: list[str] = []
        place: str | None = category
        while place and place not in steps and len(steps) < _MAX_DEPTH:
            steps.append(place)
            place = parent.get(place)
        return " > ".join(f"c{step}" for step in reversed(steps))

    found = {"category": list(parent), "path": [path(category) for category in parent]}
    return pl.DataFrame(found, {"category": pl.String, "path": pl.String})


def _properties(data: DataFolder, file: str) -> Iterator[pl.DataFrame]:
    """Yield timestamp, itemid, property and value of the rows of a file, block by block."""
    header: list[str] | None = None
    for block in stream_blocks(file):
        data.reject(block.bad, file, NOT_UTF8)
        rows = pl.DataFrame({"line": block.lines}).with_row_index("row", block.first)
        rows = rows.filter(pl.col("line").fill_null("") != "")
        if header is None and rows.height:
            header = str(rows["line"][0]).split(",")
            check_names(header, _PROPERTIES, file)
            rows = rows.slice(1)
        fields = pl.col("line").str.split(",").list
        whole = pl.col("line").str.count_matches(",", literal=True) == len(header or []) - 1
        data.reject(rows.filter(~whole), file, "not as many fields as the header")
        yield (
            rows.filter(whole)
            .select(fields.get((header or []).index(name)).alias(name) for name in _PROPERTIES)
            .with_columns(pl.col("timestamp").cast(pl.Int64, strict=False))
        )


def _items(data: DataFolder, files: list[str], paths: pl.DataFrame) -> pl.DataFrame:
    """Return the ITEMS columns of every item that has a property, in the order of their ids."""
    first = pl.DataFrame(schema=dict.fromkeys(("timestamp", *_PROPERTIES[1:]), pl.String))
    first = first.with_columns(pl.col("timestamp").cast(pl.Int64))
    for file in files:
        for rows in _properties(data, file):
            rows = rows.filter(pl.col("property") != "available").drop_nulls()
            # Each block is reduced at once: the files hold a snapshot for every week.
            first = (
                pl.concat([first, rows])
                .sort("timestamp", maintain_order=True)
                .unique(["itemid", "property"], keep="first", maintain_order=True)
            )
    category = pl.col("property") == "categoryid"
    named = first.filter(category).join(
        paths, left_on="value", right_on="category", how="left", maintain_order="left"
    )
    path = pl.coalesce("path", pl.format("c{}", "value")).alias("category")
    words = first.filter(~category).sort(
        "itemid", pl.col("property").cast(pl.Int64, strict=False), maintain_order=True
    )
    texts = words.group_by("itemid", maintain_order=True).agg(
        pl.col("value").str.join(" ").alias("text")
    )
    ids = first.select("itemid").unique().sort(pl.col("itemid").cast(pl.Int64, strict=False))
    items = ids.join(named.select("itemid", path), on="itemid", how="left", maintain_order="left")
    items = items.join(texts, on="itemid", how="left", maintain_order="left")
    none = pl.lit(None, pl.String)
    return items.select(
        pl.col("itemid").alias("item_id"),
        pl.coalesce("category", "text", pl.lit("unknown")).alias("title"),
        "text",
        none.alias("brand"),
        "category",
        none.cast(pl.Binary).alias("image"),
    )


def _readable(data: DataFolder, file: str, known: pl.Series) -> pl.DataFrame:
    rows = _table(data, file, _EVENTS).with_columns(
        pl.col("timestamp").cast(pl.Int64, strict=False).alias("time")
    )
    reasons = {
        "null user": pl.col("visitorid").is_null(),
        "null item": pl.col("itemid").is_null(),
        "unparsable timestamp": pl.col("time").is_null(),
        "unknown kind of event": ~pl.col("event").is_in(_KINDS).fill_null(False),
        "item not in the catalogue": ~pl.col("itemid").is_in(known.implode()),
    }
    shown = ["row", *_EVENTS]
    for reason, bad in reasons.items():
        data.reject(rows.filter(bad).select(shown), file, reason)
        rows = rows.filter(~bad)
    return rows.select("time", "visitorid", "event", "itemid")


def fold_visits(rows: pl.DataFrame) -> pl.DataFrame:
    """Build EVENTS from time (ms), visitorid, event and itemid: a page per item looked at."""
    ordered = rows.sort("visitorid", "time", maintain_order=True)
    pause = pl.col("time").diff().over("visitorid").fill_null(_VISIT) >= _VISIT
    other = pl.col("itemid").ne_missing(pl.col("itemid").shift(1).over("visitorid"))
    visit = pause.cum_sum().over("visitorid")
    ordered = ordered.with_columns(
        pl.format("{}-{}", "visitorid", visit).alias("session_id"),
        (pause | other).cum_sum().over("visitorid").alias("page"),
    )
    bought = (pl.col("event") == "transaction").any()
    pages = ordered.group_by("visitorid", "page", maintain_order=True).agg(
        pl.col("time", "itemid", "session_id").first(), bought.alias("bought")
    )
    item, strings = pl.concat_list("itemid"), pl.List(pl.String)
    return pages.select(
        pl.col("visitorid").alias("user_id"),
        pl.from_epoch("time", "ms").cast(pl.Datetime("us", "UTC")).alias("timestamp"),
        pl.lit(None, pl.String).alias("query"),
        pl.lit([], strings).alias("exposed_item_ids"),
        item.alias("clicked_item_ids"),
        pl.when("bought").then(item).otherwise(pl.lit([], strings)).alias("purchased_item_ids"),
        "session_id",
    ).sort("timestamp", maintain_order=True)

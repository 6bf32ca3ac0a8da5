"""Importer of MIND, the news of a portal: true impressions, titles and what was clicked before.

`SRC` holds `behaviors.tsv` and `news.tsv`, or folders that do (`MINDsmall_train/`,
`MINDsmall_dev/`). Neither file has a header, and quotes are ordinary characters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl
import pyarrow as pa

from karma_ray.artifacts import data_files, exists, open_filesystem
from karma_ray.data.click_times import click_times, cutoffs_of
from karma_ray.data.config import PrepareConfig
from karma_ray.data.identifiers import known_text
from karma_ray.data.importers.output import DataFolder
from karma_ray.data.importers.text_blocks import NOT_UTF8, stream_blocks
from karma_ray.errors import InputError

_NEWS = (
    "item_id", "category", "subcategory", "title", "abstract", "url", "title_entities",
    "abstract_entities",
)  # fmt: skip
_BEHAVIORS = ("impression_id", "user_id", "time", "history", "impressions")
_TIME = "%m/%d/%Y %I:%M:%S %p"
_LABELLED = r"^\S+-[01]( +\S+-[01])*$"
_USERS_AT_ONCE = 50_000
_SECOND = 1_000_000


def import_mind(src: str, out: str, *, seed: int = 0) -> dict[str, Any]:
    """Write the data folder of the MIND files in `src`; returns its manifest.

    Nothing is drawn at random, so `seed` has no effect.
    """
    news, behaviors = (_find(src, name) for name in ("news.tsv", "behaviors.tsv"))
    with DataFolder(out) as data:
        known, again = _write_news(data, news)
        data.flush()  # clicks on news without a row are counted from now on
        histories, times = _write_impressions(data, behaviors)
        if not times:
            raise InputError("SRC", src, f"has no labelled impression: {dict(data.quarantined)}")
        start = min(part["time"][0].as_py() for part in times)
        lost = _write_histories(data, histories, start, known)
        cutoffs = cutoffs_of(times, PrepareConfig(), None)
        return data.finish(
            name="mind",
            query_source="none",
            negative_source="exposed",
            licence="Microsoft Research License Terms: research use, no redistribution",
            cutoffs=cutoffs.iso(),
            notes=[
                "news have no queries: what is measured is recommendation, not search",
                "the history column has no times: the history of a user's first impression is "
                "written as pages of one click before the first impression of the log, a second "
                "apart, in its order; later impressions repeat it and are not read for it",
                "a user who comes first in a later file brings a history that may hold clicks of "
                "the time of the earlier one, which then train; none is younger than its test",
                "test and validation are the last clicks of the impressions, histories not "
                "counted; with the histories they would be all that has negatives",
                "impression ids begin again in each file; each row is one page. Times have no zone "
                "and are read as UTC",
                f"{again} news are in several files, and the first is kept",
                f"{lost} clicks of histories name news without a row and were left out",
            ],
        )


def _find(src: str, name: str) -> list[str]:
    """Return the files called `name` in `src` and its folders; the training's come first."""
    if not exists(src):
        raise InputError("SRC", src, "does not exist")
    files = [file for file in data_files(src, (name,)) if file.rsplit("/", 1)[-1] == name]
    if not files:
        raise InputError("SRC", src, "does not hold the expected file", choices=[name])
    fs, _ = open_filesystem(src)
    ordered = sorted(files, key=lambda file: ("train" not in file.rsplit("/", 2)[-2], file))
    return [str(fs.unstrip_protocol(file)) for file in ordered]


def _fields(data: DataFolder, file: str, names: tuple[str, ...]) -> Iterator[pl.DataFrame]:
    """Yield the rows with as many fields as there are names; others are quarantined."""
    for block in stream_blocks(file):
        data.reject(block.bad, file, NOT_UTF8)
        rows = pl.DataFrame({"line": block.lines}).with_row_index("row", block.first)
        rows = rows.filter(pl.col("line").fill_null("") != "")
        whole = pl.col("line").str.count_matches("\t", literal=True) == len(names) - 1
        data.reject(rows.filter(~whole), file, f"not {len(names)} tab-separated fields")
        fields = pl.col("line").str.split("\t").list
        yield rows.filter(whole).with_columns(
            fields.get(place).alias(name) for place, name in enumerate(names)
        )


def _write_news(data: DataFolder, files: list[str]) -> tuple[pl.Series, int]:
    """Write the items; returns their ids, and how many rows were in an earlier file already."""
    known, again = pl.Series("item_id", [], pl.String), 0
    for file in files:
        earlier = known
        for rows in _fields(data, file, _NEWS):
            rows = rows.with_columns(known_text(name) for name in ("item_id", "title", "abstract"))
            bad = pl.col("item_id").is_null() | pl.col("title").is_null()
            data.reject(rows.filter(bad).select("row", "line"), file, "item without id or title")
            rows = rows.filter(~bad)
            old = pl.col("item_id").is_in(earlier.implode())
            again += rows.filter(old).height
            rows = rows.filter(~old)
            repeated = pl.col("item_id").is_in(known.implode())
            repeated |= ~pl.col("item_id").is_first_distinct()
            data.reject(rows.filter(repeated).select("row", "line"), file, "repeated item id")
            rows = rows.filter(~repeated)
            known = pl.concat([known, rows["item_id"]])
            path = pl.concat_str("category", "subcategory", separator=" > ")
            none = pl.lit(None, pl.String)
            data.append(
                "items",
                rows.select(
                    "item_id", "title", pl.col("abstract").alias("text"), none.alias("brand"),
                    path.alias("category"), none.cast(pl.Binary).alias("image"),
                ),
            )  # fmt: skip
    return known, again


def _write_impressions(data: DataFolder, files: list[str]) -> tuple[pl.DataFrame, list[pa.Table]]:
    """Write the impressions; returns each user's first history, and the clicks per time."""
    first = pl.DataFrame(
        schema={"user_id": pl.String, "timestamp": pl.Datetime("us", "UTC"), "history": pl.String}
    )
    times: list[pa.Table] = []
    for file in files:
        for rows in _fields(data, file, _BEHAVIORS):
            when = pl.col("time").str.to_datetime(_TIME, time_unit="us", strict=False)
            rows = rows.with_columns(
                known_text("user_id"), when.dt.replace_time_zone("UTC").alias("timestamp"),
                pl.col("impressions").str.strip_chars(),
            )  # fmt: skip
            reasons = {
                "null user": pl.col("user_id").is_null(),
                "unparsable timestamp": pl.col("timestamp").is_null(),
                "impressions without labels, as in the test files": ~pl.col(
                    "impressions"
                ).str.contains(_LABELLED),
            }
            for reason, bad in reasons.items():
                data.reject(rows.filter(bad).select("row", "line"), file, reason)
                rows = rows.filter(~bad)
            if rows.is_empty():
                continue
            seen = pl.concat([first, rows.select(first.columns)])
            first = seen.sort("timestamp", maintain_order=True).unique(
                "user_id", keep="first", maintain_order=True
            )
            pages = _pages(rows)
            data.append("events", pages)
            times.append(click_times(pages.to_arrow()).sort_by("time"))
    return first, times


def _pages(rows: pl.DataFrame) -> pl.DataFrame:
    shown = pl.col("impressions").str.extract_all(r"\S+")
    clicked = shown.list.eval(pl.element().filter(pl.element().str.ends_with("-1")))
    strings = pl.List(pl.String)
    return rows.select(
        "user_id",
        "timestamp",
        pl.lit(None, pl.String).alias("query"),
        shown.list.eval(pl.element().str.head(-2)).list.unique(maintain_order=True)
        .alias("exposed_item_ids"),
        clicked.list.eval(pl.element().str.head(-2)).list.unique(maintain_order=True)
        .alias("clicked_item_ids"),
        pl.lit(None, strings).alias("purchased_item_ids"),
        pl.lit(None, pl.String).alias("session_id"),
    )  # fmt: skip


def _write_histories(
    data: DataFolder, histories: pl.DataFrame, start: int, known: pl.Series
) -> int:
    """Write the histories as pages of one click before `start`; returns how many were lost."""
    lost = 0
    ordered = histories.sort("user_id")
    for part in ordered.iter_slices(_USERS_AT_ONCE):
        clicks = part.select(
            "user_id", pl.col("history").str.extract_all(r"\S+").alias("item_id")
        ).filter(pl.col("item_id").list.len() > 0)
        clicks = clicks.explode("item_id")
        back = pl.int_range(pl.len(), 0, -1).over("user_id") * _SECOND
        when = (pl.lit(start) - back).cast(pl.Datetime("us", "UTC"))
        found = clicks.with_columns(when.alias("timestamp")).filter(
            pl.col("item_id").is_in(known.implode())
        )
        lost += clicks.height - found.height
        pages = found.rename({"item_id": "impressions"}).with_columns(
            pl.format("{}-1", "impressions").alias("impressions")
        )
        unknown = pl.lit([], pl.List(pl.String)).alias("exposed_item_ids")
        data.append("events", _pages(pages).with_columns(unknown))
    return lost

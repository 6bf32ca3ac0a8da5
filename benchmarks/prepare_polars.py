"""A single-process script in Polars that makes the windows and examples of `jobs/prepare.py`.

It is what one would write for a log that fits into memory: no quarantine, no leak checks, no seeded
choice of negatives (pages show fewer than are kept). benchmarks/prepare.py compares with it.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

HISTORY = 20


def prepare(data: str, out: str) -> None:
    """Read events/ and items/ of `data` and write sequences.parquet, valid and test to `out`."""
    items = pl.scan_parquet(f"{data}/items/*.parquet").select("item_id")
    events = pl.read_parquet(f"{data}/events/*.parquet").with_row_index("order")
    known = items.collect()["item_id"].implode()
    keys = ["user_id", "timestamp", "query", "session_id"]
    pages = events.unique(keys, keep="first").sort("user_id", "timestamp", "query", "session_id")
    ordinal = pl.int_range(pl.len()).over("user_id", "timestamp")
    micros = pl.col("timestamp").dt.epoch("us")
    pages = pages.with_columns(page_id=pl.format("{}-{}-{}", "user_id", micros, ordinal))
    pages = pages.sort("user_id", "timestamp", "order").with_row_index("page")
    clicks = pages.select("page", "user_id", "timestamp", "query", "page_id",
                          item="clicked_item_ids").explode("item")  # fmt: skip
    clicks = clicks.filter(pl.col("item").is_in(known))
    times = clicks["timestamp"].sort()
    valid_start, test_start = times[times.len() * 8 // 10], times[times.len() * 9 // 10]
    Path(out).mkdir(parents=True, exist_ok=True)
    before = pl.col("timestamp") < valid_start
    windows(
        clicks.filter(before), negatives(pages.filter(before), known, "session_id")
    ).write_parquet(f"{out}/sequences.parquet")
    in_valid = pl.col("timestamp").is_between(valid_start, test_start, closed="left")
    for split, span in (("valid", in_valid), ("test", pl.col("timestamp") >= test_start)):
        shown = negatives(pages.filter(span), known, "page")
        examples(clicks, span, shown).write_parquet(f"{out}/{split}.parquet")


def negatives(pages: pl.DataFrame, known: pl.Series, scope: str) -> pl.DataFrame:
    """Return the items per page that were shown and not clicked in its scope, in their order."""
    pages = pages.with_columns(scope=pl.col(scope))
    shown = pages.select("page", "user_id", "scope", item="exposed_item_ids").explode("item")
    shown = shown.filter(pl.col("item").is_in(known))
    liked = pages.select("user_id", "scope", item="clicked_item_ids").explode("item").unique()
    left = shown.with_row_index("shown").join(liked, on=["user_id", "scope", "item"], how="anti")
    return left.sort("shown").group_by("page", maintain_order=True).agg(negative="item")


def windows(clicks: pl.DataFrame, shown: pl.DataFrame) -> pl.DataFrame:
    """Cut the clicks of every user into overlapping windows."""
    size, stride = HISTORY + 1, (HISTORY + 1) // 2
    clicks = clicks.join(shown, on="page", how="left", maintain_order="left").with_columns(
        pl.col("negative").fill_null([])
    )
    clicks = clicks.with_row_index("place")
    users = clicks.group_by("user_id", maintain_order=True).agg(
        first=pl.col("place").min(), n=pl.len()
    )
    more = ((pl.col("n").cast(pl.Int64) - size).clip(0) + stride - 1) // stride
    cut = users.with_columns(number=pl.int_ranges(0, more + 1)).explode("number")
    end = pl.min_horizontal(size + pl.col("number") * stride, "n")
    cut = (
        cut.with_row_index("window")
        .with_columns(end=end)
        .with_columns(
            start=(pl.col("end") - size).clip(0),
            loss=pl.when(pl.col("number") == 0)
            .then(0)
            .otherwise(size + (pl.col("number") - 1) * stride),
        )
    )
    steps = cut.with_columns(at=pl.int_ranges("start", "end")).explode("at")
    rows = clicks[(steps["first"] + steps["at"])]
    rows = rows.with_columns(window=steps["window"], loss_mask=steps["at"] >= steps["loss"])
    return rows.group_by("window", maintain_order=True).agg(
        pl.col("user_id").first(), queries="query", item_ids="item", timestamps="timestamp",
        page_ids="page_id", hard_negative_ids="negative", loss_mask="loss_mask",
    ).drop("window")  # fmt: skip


def examples(clicks: pl.DataFrame, span: pl.Expr, shown: pl.DataFrame) -> pl.DataFrame:
    """Return a row per click in a span of time, with the user's clicks before it."""
    clicks = clicks.with_row_index("place").with_columns(
        end=pl.col("place").min().over("user_id", "timestamp"),
        first=pl.col("place").min().over("user_id"),
    )
    asked = clicks.filter(span).with_row_index("example")
    asked = asked.with_columns(
        start=pl.max_horizontal(pl.col("end").cast(pl.Int64) - HISTORY, "first")
    )
    past = asked.select("example", at=pl.int_ranges("start", pl.col("end").cast(pl.Int64)))
    past = past.explode("at").drop_nulls("at")
    rows = clicks[past["at"]].select("query", "item", "timestamp").with_columns(past["example"])
    history = rows.group_by("example", maintain_order=True).agg(
        history_queries="query", history_item_ids="item", history_timestamps="timestamp"
    )
    positives = asked.group_by("page", maintain_order=True).agg(
        page_positive_ids=pl.col("item").unique(maintain_order=True)
    )
    found = asked.join(positives, on="page", how="left").join(history, on="example", how="left")
    found = found.join(shown, on="page", how="left", maintain_order="left").sort("example")
    lists = ("history_queries", "history_item_ids", "history_timestamps", "negative")
    return found.with_columns(pl.col(name).fill_null([]) for name in lists).select(
        "user_id", "timestamp", "query", "page_id", "page_positive_ids", *lists[:3],
        positive_item_id="item", hard_negative_ids="negative",
    )  # fmt: skip

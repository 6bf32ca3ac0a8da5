"""Checks that no later click reaches an earlier example; every preparation ends with them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
import pyarrow as pa

from karma_ray.data.splits import Cutoffs
from karma_ray.errors import LeakError


def check_no_leak(sequences: pa.Table, examples: Mapping[str, pa.Table], cutoffs: Cutoffs) -> None:
    """Raise LeakError if something of a later time reaches an earlier example.

    sequences: every step is before `valid_start`; steps are in time order; no page of an example
    is trained on. examples: each is in the time span of its split; its history has only clicks
    strictly before it (which excludes clicks of the same page) in time order; a page has one
    time; no hard negative was clicked on the page.
    """
    trained_pages = _check_sequences(sequences, cutoffs)
    spans = {
        "valid": (cutoffs.valid_start, cutoffs.test_start),
        "test": (cutoffs.test_start, np.iinfo(np.int64).max),
    }
    seen: list[pl.DataFrame] = []
    for split, table in examples.items():
        frame = pl.DataFrame(pl.from_arrow(table)).with_row_index("row")
        frame = frame.with_columns(pl.col("timestamp").dt.epoch("us").alias("time"))
        first, last = spans[split]
        outside = frame.filter((pl.col("time") < first) | (pl.col("time") >= last))
        _none(outside, f"{split} examples: an example lies outside its split's span of time")
        _check_history(frame, split)
        pages = frame.select("user_id", "page_id", "time").unique()
        both = pages.join(trained_pages, on=["user_id", "page_id"], how="semi")
        _none(both, f"{split} examples: a page is trained on and evaluated")
        seen.append(pages)
    pages = pl.concat(seen).unique() if seen else pl.DataFrame({"user_id": [], "page_id": []})
    twice = pages.filter(pages.select("user_id", "page_id").is_duplicated())
    _none(twice, "examples: a page has two times")


def _check_sequences(sequences: pa.Table, cutoffs: Cutoffs) -> pl.DataFrame:
    """Raise LeakError on a late or unordered step; return trained (user_id, page_id) pairs."""
    frame = pl.DataFrame(pl.from_arrow(sequences.select(["user_id", "timestamps", "page_ids"])))
    steps = (
        frame.with_row_index("row")
        .explode("timestamps", "page_ids")
        .with_columns(pl.col("timestamps").dt.epoch("us").alias("time"))
    )
    late = steps.filter(pl.col("time") >= cutoffs.valid_start)
    _none(late, f"sequences: a step is not before valid_start {cutoffs.iso()['valid_start']}")
    older = steps.filter(_falls("time"))
    _none(older, "sequences: a step is older than the one before it")
    return steps.select("user_id", page_id="page_ids")


def _check_history(frame: pl.DataFrame, split: str) -> None:
    lengths = [pl.col(f"history_{name}").list.len() for name in ("queries", "timestamps")]
    uneven = frame.filter(
        pl.any_horizontal(length != pl.col("history_item_ids").list.len() for length in lengths)
    )
    _none(uneven, f"{split} examples: the history's columns differ in length")
    past = frame.select(
        "row", "user_id", "page_id", "time", then=pl.col("history_timestamps")
    ).explode("then")
    past = past.with_columns(pl.col("then").dt.epoch("us"))
    _none(
        past.filter(pl.col("then") >= pl.col("time")),
        f"{split} examples: the history holds a click that is not before the example",
    )
    _none(
        past.filter(_falls("then")),
        f"{split} examples: the history is not in the order of time",
    )
    clicked = pl.col("page_positive_ids").list.set_union(pl.concat_list("positive_item_id"))
    both = pl.col("hard_negative_ids").list.set_intersection(clicked).list.len() > 0
    _none(frame.filter(both), f"{split} examples: a hard negative was clicked on the page")


def _falls(time: str) -> pl.Expr:
    """Whether a time is before that of the step above it in the same row."""
    same = pl.col("row") == pl.col("row").shift(1)
    return same & (pl.col(time) < pl.col(time).shift(1))


def _none(rows: pl.DataFrame, problem: str) -> None:
    if rows.height:
        who = rows.row(0, named=True)
        raise LeakError(
            f"{problem} ({rows.height} times; first: user {who['user_id']!r}, "
            f"page {who.get('page_id', who.get('page_ids'))!r})"
        )

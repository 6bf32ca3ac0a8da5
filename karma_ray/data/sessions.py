"""Training sequences and evaluation examples from events (equation 1).

Legend: P pages, C clicks, W windows. A page is one (user, time, query, session); event rows that
are equal in all four are one page, so that a log line delivered twice changes nothing. Clicks are
ordered by user, time, input row and position on the page: **clicks with equal times keep the
input's row order**. They are hidden from each other, so this order carries no information.

All functions are vectorised over partitions of users; a user is never divided.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from karma_ray.data.config import PrepareConfig
from karma_ray.data.hard_negatives import page_negatives
from karma_ray.data.held_out import without_items
from karma_ray.data.schema import EXAMPLES, SEQUENCES
from karma_ray.data.splits import Cutoffs


def build_pages(events: pa.Table) -> pl.DataFrame:
    """Build pages from clean events (CLEAN_EVENTS) of whole users, by user, time, input row.

    Columns: user_id, timestamp, query, exposed, clicked, purchased (lists without repeats),
    page_id `user-microseconds-ordinal` (the ordinal numbers a user's pages of one time by query
    and session, so that ids depend on neither input order nor partition), `time` in microseconds,
    `page` 0..P-1 and `session` (the first page of the session, or the page itself).
    """
    frame = pl.DataFrame(pl.from_arrow(events.rename_columns(_SHORT)))
    frame = frame.with_columns(
        pl.when(pl.col("session_id") != "").then(pl.col("session_id")).alias("session_id"),
        pl.col("timestamp").dt.epoch("us").alias("time"),
    )
    keys = ["user_id", "timestamp", "time", "query", "session_id"]
    if frame.select(keys).is_duplicated().any():
        lists = [pl.col(name).list.explode(empty_as_null=False) for name in _LISTS]
        frame = frame.sort("order").group_by(keys).agg(*lists, pl.col("order").min())
    frame = frame.with_columns(pl.col(name).list.unique(maintain_order=True) for name in _LISTS)
    at_once = ["user_id", "time"]
    frame = frame.sort([*at_once, "query", "session_id"], nulls_last=False)
    new = frame["user_id"].rle_id().to_numpy(), frame["time"].to_numpy()
    moment = _start_of_run(np.any([np.diff(each, prepend=each[:1] - 1) != 0 for each in new], 0))
    ordinal = pl.lit(pl.Series(np.arange(len(moment)) - moment))
    frame = frame.with_columns(pl.format("{}-{}-{}", "user_id", "time", ordinal).alias("page_id"))
    frame = frame.sort([*at_once, "order"]).with_row_index("page")
    first = pl.col("page").min().over("user_id", "session_id")
    session = pl.when(pl.col("session_id").is_null()).then(pl.col("page")).otherwise(first)
    return frame.with_columns(session.alias("session"))


def build_sequences(
    pages: pl.DataFrame, cutoffs: Cutoffs, config: PrepareConfig, held_out: pa.Array | None = None
) -> pa.Table:
    """Build training windows (SEQUENCES) from the clicks before `valid_start` only.

    The items `held_out` (ids) are in none of them, neither as a click nor as a negative.
    A window has size = max_history + 1 clicks, so that its last step has as long a history as a
    request may have. A user with n <= size clicks has one window. More clicks are divided into a
    first window of that size and further ones shifted by size // 2. The part of a window that an
    earlier one contains is context, so every click has `loss_mask` true in exactly one window.
    """
    pages = pages.filter(pl.col("time") < cutoffs.valid_start).drop("page")
    if held_out is not None:
        pages = without_items(pages, held_out)
    pages = pages.with_row_index("page")
    clicks = _Clicks.of(pages)
    start, end, loss_from = _windows(clicks.user_start, config.max_history + 1)
    negatives = page_negatives(pages, "session", config.num_hard_negatives, config.seed)
    columns = {
        "user_id": clicks.users.take(pa.array(start)),
        "queries": _slices(clicks.queries, start, end),
        "item_ids": _slices(clicks.items, start, end),
        "timestamps": _slices(clicks.times, start, end),
        "page_ids": _slices(clicks.page_ids, start, end),
        "hard_negative_ids": _slices(negatives.take(pa.array(clicks.page)), start, end),
    }
    steps = columns["item_ids"].values
    place = _gather(start, end)
    in_loss = place >= np.repeat(loss_from, end - start)
    assert len(steps) == len(in_loss)
    columns["loss_mask"] = pa.ListArray.from_arrays(
        columns["item_ids"].offsets, pa.array(in_loss, pa.bool_())
    )
    return pa.table(columns, schema=SEQUENCES)


def build_examples(
    pages: pl.DataFrame, start: int, end: int | None, config: PrepareConfig
) -> pa.Table:
    """Build one row (EXAMPLES) per click with start <= time < end, in microseconds.

    The history is the user's last max_history clicks strictly before the click's time, so clicks
    of the same page, or of another page at the same time, are not part of it.
    """
    clicks = _Clicks.of(pages)
    wanted = clicks.time >= start
    if end is not None:
        wanted &= clicks.time < end
    rows = np.flatnonzero(wanted)
    history_end = clicks.moment_start[rows]
    history_start = np.maximum(clicks.user_start[rows], history_end - config.max_history)
    page = clicks.page[rows]
    span = (
        (pl.col("time") >= start)
        if end is None
        else pl.col("time").is_between(start, end, closed="left")
    )
    asked = pages.filter(span)
    # Pages outside the span have no row in `asked` and are never looked up.
    place = np.full(pages.height, -1)
    place[asked["page"].to_numpy()] = np.arange(asked.height)
    negatives = page_negatives(asked, "page", None, config.seed)
    take = pa.array(rows)
    columns = {
        "user_id": clicks.users.take(take),
        "timestamp": clicks.times.take(take),
        "query": clicks.queries.take(take),
        "page_id": clicks.page_ids.take(take),
        "page_positive_ids": _lists(asked["clicked"]).take(pa.array(place[page])),
        "history_queries": _slices(clicks.queries, history_start, history_end),
        "history_item_ids": _slices(clicks.items, history_start, history_end),
        "history_timestamps": _slices(clicks.times, history_start, history_end),
        "positive_item_id": clicks.items.take(take),
        "hard_negative_ids": negatives.take(pa.array(place[page])),
    }
    return pa.table(columns, schema=EXAMPLES)


_LISTS = ("exposed", "clicked", "purchased")
_SHORT = {
    "exposed_item_ids": "exposed",
    "clicked_item_ids": "clicked",
    "purchased_item_ids": "purchased",
}


@dataclass(frozen=True)
class _Clicks:
    """All clicks [C], in order; `*_start` is the first click of the same user or time."""

    users: pa.Array
    queries: pa.Array
    items: pa.Array
    times: pa.Array
    page_ids: pa.Array
    page: np.ndarray
    time: np.ndarray
    user_start: np.ndarray
    moment_start: np.ndarray

    @classmethod
    def of(cls, pages: pl.DataFrame) -> _Clicks:
        clicks = pages.select(
            "user_id", "query", "timestamp", "page_id", "page", "time", item="clicked"
        ).explode("item")
        user = clicks["user_id"].rle_id().to_numpy()
        time = clicks["time"].to_numpy()
        new_user = np.diff(user, prepend=-1) != 0
        new_moment = new_user | (np.diff(time, prepend=0) != 0)
        return cls(
            users=_array(clicks["user_id"], pa.string()),
            queries=_array(clicks["query"], pa.string()),
            items=_array(clicks["item"], pa.string()),
            times=_array(clicks["timestamp"], SEQUENCES.field("timestamps").type.value_type),
            page_ids=_array(clicks["page_id"], pa.string()),
            page=clicks["page"].to_numpy().astype(np.int64),
            time=time,
            user_start=_start_of_run(new_user),
            moment_start=_start_of_run(new_moment),
        )


def _start_of_run(is_first: np.ndarray) -> np.ndarray:
    # [C] bool -> [C]: index of the last True at or before each position
    first: np.ndarray = np.maximum.accumulate(np.where(is_first, np.arange(len(is_first)), 0))
    return first


def _windows(user_start: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return first click, end and first click with a loss of every window [W], by user."""
    first, count = np.unique(user_start, return_counts=True)
    stride = max(1, size // 2)
    num_windows = 1 + -(-np.maximum(count - size, 0) // stride)
    window_user = np.repeat(np.arange(len(first)), num_windows)
    number = np.arange(len(window_user)) - np.repeat(
        np.cumsum(num_windows) - num_windows, num_windows
    )
    end = np.minimum(size + number * stride, count[window_user])
    loss_from = np.where(number == 0, 0, size + (number - 1) * stride)
    start = np.maximum(0, end - size)
    base = first[window_user]
    return base + start, base + end, base + loss_from


def _gather(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    # [W], [W] -> the concatenated ranges start..end
    lengths = end - start
    before = np.cumsum(lengths) - lengths
    places: np.ndarray = np.arange(int(lengths.sum())) + np.repeat(start - before, lengths)
    return places


def _slices(values: pa.Array, start: np.ndarray, end: np.ndarray) -> pa.ListArray:
    """Return a list array [W] of values[start:end]."""
    offsets = np.concatenate([[0], np.cumsum(end - start)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values.take(pa.array(_gather(start, end))))


def _array(series: pl.Series, kind: pa.DataType) -> pa.Array:
    return series.to_arrow().cast(kind)


def _lists(series: pl.Series) -> pa.Array:
    return series.to_arrow().cast(pa.list_(pa.string()))

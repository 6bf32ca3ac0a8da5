"""The number of clicks per time, from which the cutoffs are chosen without holding all times.

A part reports its clicks per day. These tell on which days the cutoffs lie; only the times of
those days are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from karma_ray.data.config import PrepareConfig
from karma_ray.data.splits import Cutoffs, choose_cutoffs

CLICK_TIMES = pa.schema([pa.field("time", pa.int64()), pa.field("clicks", pa.int64())])
"""Clicks per microsecond."""
DAY = 86_400_000_000
"""Microseconds."""

Days = Sequence[Sequence[int]]
"""[day, first time with a click, clicks] of days since 1970."""


def click_times(clean: pa.Table) -> pa.Table:
    """Return the number of clicks per distinct time of clean events (CLICK_TIMES), by time."""
    times = clean.column("timestamp").cast(pa.int64())
    clicks = pc.list_value_length(clean.column("clicked_item_ids")).cast(pa.int64())
    grouped = pa.table({"time": times, "clicks": clicks}).group_by("time")
    total = grouped.aggregate([("clicks", "sum")]).sort_by("time")
    return pa.table([total["time"], total["clicks_sum"]], schema=CLICK_TIMES)


def clicks_per_day(times: pa.Table) -> list[list[int]]:
    """Return the days of a table CLICK_TIMES that is in the order of time."""
    time, clicks = times["time"].to_numpy(), times["clicks"].to_numpy()
    if time.size == 0:
        return []
    days, first = np.unique(time // DAY, return_index=True)
    return [list(row) for row in zip(
        days.tolist(), time[first].tolist(), np.add.reduceat(clicks, first).tolist(), strict=True,
    )]  # fmt: skip


def cutoffs_of(
    times: Iterable[pa.Table], config: PrepareConfig, manifest: Mapping[str, Any] | None
) -> Cutoffs:
    """Choose the cutoffs for all clicks, from every part's times (CLICK_TIMES)."""
    whole = pa.concat_tables([CLICK_TIMES.empty_table(), *times])
    return choose_cutoffs(
        whole["time"].to_numpy(),
        whole["clicks"].to_numpy(),
        config.valid_share,
        config.test_share,
        manifest,
    )


def cutoffs_by_day(
    days: Iterable[Days],
    read: Callable[[int, int], pa.Table],
    config: PrepareConfig,
    manifest: Mapping[str, Any] | None,
) -> Cutoffs:
    """Choose the same cutoffs from every part's days, and from the times of a few of these.

    `read` returns the times (CLICK_TIMES) of all parts in a span: first <= time < end.
    """
    rows = np.array([day for part in days for day in part], dtype=np.int64).reshape(-1, 3)
    names, of_row = np.unique(rows[:, 0], return_inverse=True)
    clicks = np.bincount(of_row, rows[:, 2]).astype(np.int64)
    first = np.full(names.size, np.iinfo(np.int64).max)
    np.minimum.at(first, of_row, rows[:, 1])
    wanted = _days_of_cutoffs(clicks, config)
    # The clicks of another day count as if all were at its first time: no cutoff lies there.
    whole = [pa.table([np.delete(first, wanted), np.delete(clicks, wanted)], schema=CLICK_TIMES)]
    whole += [read(int(day) * DAY, (int(day) + 1) * DAY) for day in names[wanted]]
    return cutoffs_of(whole, config, manifest)


def _days_of_cutoffs(clicks: np.ndarray, config: PrepareConfig) -> list[int]:
    """Return the places of the days that a cutoff may lie on, given the clicks of every day."""
    if clicks.size == 0:
        return []
    reached, last = np.cumsum(clicks), clicks.size - 1
    shares = (1.0 - config.valid_share - config.test_share, 1.0 - config.test_share)
    targets = [round(share * float(reached[-1]), 6) for share in shares]
    on = np.minimum(np.searchsorted(reached, targets, side="right"), last)
    # The day before, because validation may have to begin one time earlier.
    return sorted({int(day) for place in on for day in (place, max(0, place - 1))} | {last})

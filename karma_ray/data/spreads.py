"""Distributions in a few numbers: quantiles, histograms, days and concentration."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


def spread(values: pl.Series) -> dict[str, Any]:
    """Return mean, quantiles and a histogram over powers of two of counts."""
    if values.is_empty():
        return {"mean": 0.0, "max": 0, "quantiles": {}, "histogram": []}
    ranked = values.sort()
    places = {f"{q:g}": int(ranked[int(q * (len(ranked) - 1))]) for q in QUANTILES}
    edges = [0, *(2**n for n in range(int(ranked[-1]).bit_length() + 1))]
    numbers, _ = np.histogram(ranked.to_numpy(), [*edges, edges[-1] * 2])
    bars = [{"from": low, "count": int(n)} for low, n in zip(edges, numbers, strict=True)]
    bars = bars[bars[0]["count"] == 0 :]  # whether anybody has none
    bars = bars[: len(bars) - (bars[-1]["count"] == 0)]
    return {"mean": float(np.mean(ranked.to_numpy())), "max": int(ranked[-1]), "quantiles": places,
            "histogram": bars}  # fmt: skip


def weighted(table: pl.DataFrame) -> dict[str, Any]:
    """Return mean, quantiles and a histogram of lengths, of which each has a count `n`."""
    total = int(table["n"].sum())
    if not total:
        return {"mean": 0.0, "max": 0, "quantiles": {}, "histogram": []}
    reached = table["n"].cum_sum().to_numpy()
    lengths = table["length"].to_list()
    places = {
        f"{q:g}": lengths[int(np.searchsorted(reached, q * total, side="left"))] for q in QUANTILES
    }
    mean = float((table["length"] * table["n"]).sum()) / total
    bars = [{"from": length, "count": n} for length, n in table.rows()]
    return {"mean": mean, "max": lengths[-1], "quantiles": places, "histogram": bars}


def coverage(days: pl.DataFrame) -> dict[str, Any]:
    """Return the first and last day, days without an event, and the events and clicks of each."""
    known = days.drop_nulls("day")
    if known.is_empty():
        return {"first": None, "last": None, "days": 0, "empty_days": 0, "per_day": []}
    dated = known.with_columns(pl.col("day").cast(pl.Int32).cast(pl.Date).dt.to_string("%F"))
    span = int(known["day"][-1]) - int(known["day"][0]) + 1
    return {
        "first": dated["day"][0], "last": dated["day"][-1], "days": span,
        "empty_days": span - known.height, "per_day": dated.rows(),
    }  # fmt: skip


def concentration(clicks: np.ndarray, num_items: int) -> dict[str, Any]:
    """Return the shares of the most clicked items; `clicks` per item are in falling order."""
    total, size = max(1, int(clicks.sum())), max(num_items, len(clicks), 1)
    reached = np.cumsum(clicks) / total
    shares = {}
    for part in (0.001, 0.01, 0.1, 0.2):
        top = min(len(clicks), max(1, round(part * size)))
        shares[f"{part:g}"] = float(reached[top - 1]) if top and len(clicks) else 0.0
    rising = np.concatenate([np.zeros(size - len(clicks)), clicks[::-1]])
    weights = np.arange(1, size + 1)
    gini = float(2 * (weights * rising).sum() / (size * total) - (size + 1) / size)
    places = np.unique(np.geomspace(1, max(1, len(clicks)), 200).astype(int)) - 1
    curve = [[int(p) + 1, float(reached[p])] for p in places] if len(clicks) else []
    never = max(0, num_items - len(clicks))
    return {"top_shares": shares, "gini": gini, "never_clicked": never, "curve": curve}

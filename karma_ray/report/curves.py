"""Validation over time: what a study's rows had reached when, and whether they had flattened."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from karma_ray.report.comparison import Variant
from karma_ray.report.results import Record


@dataclass(frozen=True)
class Race:
    """A validation metric of a row and its baseline: means over the seeds that both have."""

    seconds: float
    """Joint training time of whichever ended first."""
    then: float
    then_lead: float
    """The row's value at those seconds, and minus the baseline's."""
    end: float
    end_lead: float
    """The same at the last validated step of each."""


def race(variant: Variant, baseline: Variant, metric: str) -> Race | None:
    """Equal seconds and equal steps; None where no seed was validated in both."""
    found = []
    for seed in sorted({*variant.records} & {*baseline.records}):
        row, base = (_curve(v.records[seed], metric) for v in (variant, baseline))
        if row and base:
            seconds = min(row[-1][0], base[-1][0])
            then, end = _value_at(row, seconds), row[-1][1]
            found.append((seconds, then, then - _value_at(base, seconds), end, end - base[-1][1]))
    return Race(*map(statistics.fmean, zip(*found, strict=True))) if found else None


def _curve(record: Record, metric: str) -> list[tuple[float, float]]:  # (seconds, value)
    return [(p["seconds"], p[metric]) for p in record.get("curve", []) if metric in p]


def _value_at(curve: list[tuple[float, float]], seconds: float) -> float:
    """Between two validated steps by a straight line."""
    times, values = zip(*curve, strict=True)
    return float(np.interp(seconds, times, values))


def late_gain(variant: Variant, metric: str) -> float | None:
    """What the last quarter of the steps added on the validation examples, mean over seeds."""
    found = []
    for record in variant.records.values():
        points = [(p["step"], p[metric]) for p in record.get("curve", []) if metric in p]
        if len(points) > 1:
            steps, values = zip(*points, strict=True)
            found.append(values[-1] - float(np.interp(0.75 * steps[-1], steps, values)))
    return statistics.fmean(found) if found else None

"""Validation curves of a study's rows: values at equal times, and whether they still rise."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from karma_ray.studies.comparison import Variant
from karma_ray.studies.records import Record


@dataclass(frozen=True)
class Race:
    """A validation metric of a row and its baseline, as means over the seeds of both."""

    seconds: float
    """Joint training time of the one that ended first."""
    then: float
    then_lead: float
    """The row's value after these seconds, and its lead over the baseline."""
    end: float
    end_lead: float
    """The same at the last validated step of each."""


def race(variant: Variant, baseline: Variant, metric: str) -> Race | None:
    """Compare at equal seconds and at the end; None if no seed was validated in both."""
    found = []
    for seed in sorted({*variant.records} & {*baseline.records}):
        row, base = (_curve(v.records[seed], metric) for v in (variant, baseline))
        if row and base:
            seconds = min(row[-1][0], base[-1][0])
            then, end = _value_at(row, seconds), row[-1][1]
            found.append((seconds, then, then - _value_at(base, seconds), end, end - base[-1][1]))
    return Race(*map(statistics.fmean, zip(*found, strict=True))) if found else None


def late_gain(variant: Variant, metric: str) -> float | None:
    """Return the gain of the last quarter of the steps on validation, as a mean over seeds."""
    found = []
    for record in variant.records.values():
        curve = _curve(record, metric, "step")
        if len(curve) > 1:
            steps, end = curve[-1]
            found.append(end - _value_at(curve, 0.75 * steps))
    return statistics.fmean(found) if found else None


def _curve(record: Record, metric: str, clock: str = "seconds") -> list[tuple[float, float]]:
    """Return (seconds or steps, value) of every validation with the metric."""
    return [(p[clock], p[metric]) for p in record.get("curve", []) if metric in p]


def _value_at(curve: list[tuple[float, float]], place: float) -> float:
    """Interpolate linearly between two validations."""
    places, values = zip(*curve, strict=True)
    return float(np.interp(place, places, values))

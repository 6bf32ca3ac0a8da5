"""Validation over time: what a study's rows had reached when, and whether they had flattened."""

from __future__ import annotations

import statistics

import numpy as np

from karma_ray.report.comparison import Group, Variant


def at_seconds(variant: Variant, metric: str, seconds: float) -> float | None:
    """Mean over seeds of the validation metric after `seconds` of joint training, between two
    validated steps by a straight line; None where a seed was not validated that late."""
    found = []
    for record in variant.records.values():
        points = [(p["seconds"], p[metric]) for p in record.get("curve", []) if metric in p]
        if not points or points[-1][0] < seconds:
            return None
        times, values = zip(*points, strict=True)
        found.append(float(np.interp(seconds, times, values)))
    return statistics.fmean(found) if found else None


def common_seconds(group: Group) -> float | None:
    """The largest joint training time that every trained row of the group reached."""
    ends = [
        record["curve"][-1]["seconds"]
        for variant in group.variants
        for record in variant.records.values()
        if record.get("curve")
    ]
    return min(ends) if len(ends) > 1 else None


def late_gain(variant: Variant, metric: str) -> float | None:
    """What the last quarter of the steps added on the validation examples, mean over seeds."""
    found = []
    for record in variant.records.values():
        points = [(p["step"], p[metric]) for p in record.get("curve", []) if metric in p]
        if len(points) > 1:
            steps, values = zip(*points, strict=True)
            found.append(values[-1] - float(np.interp(0.75 * steps[-1], steps, values)))
    return statistics.fmean(found) if found else None

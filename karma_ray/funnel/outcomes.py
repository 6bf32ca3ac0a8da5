"""Sums per user of what a ranker did, and differences of rankers over users and seeds.

A metric is sum(value x weight) / sum(weight) over clicks. Sums per user are all that a bootstrap
over users needs, and are kept as a table, so that reports of several seeds can be combined.
Legend: n clicks, U users.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from karma_ray.metrics.significance import BootstrapResult, paired_bootstrap
from karma_ray.studies.comparison import Difference

Floats = NDArray[np.float64]
SEED = 0
"""Seed of the bootstrap."""


@dataclass(frozen=True)
class UserSums:
    """What one ranker did in one stage, in percent."""

    users: tuple[str, ...]
    """[U]"""
    sums: Mapping[str, tuple[Floats, Floats]]
    """metric -> (sum of value x weight, sum of weights), each [U]; weight 0 is unmeasured."""

    @classmethod
    def of(
        cls, users: Sequence[str], values: Mapping[str, Floats],
        weights: Mapping[str, Floats] | None = None,
    ) -> UserSums:  # fmt: skip
        """Add up shares in [0, 1] of clicks [n]; the weight is 1 unless `weights` says another."""
        names, user = np.unique(np.asarray(users, dtype=str), return_inverse=True)
        sums = {}
        for metric, value in values.items():
            weight = (weights or {}).get(metric, np.ones(len(value)))
            total = np.bincount(user, 100.0 * value * weight, len(names)).astype(np.float64)
            sums[metric] = (total, np.bincount(user, weight, len(names)).astype(np.float64))
        return cls(tuple(names.tolist()), sums)

    def mean(self, metric: str) -> float | None:
        """Return a metric in percent, or None if it was not measured."""
        if metric not in self.sums:
            return None
        total, weight = self.sums[metric]
        return float(total.sum() / weight.sum()) if weight.any() else None

    def table(self) -> pa.Table:
        """Return the sums as rows (metric, user_id, sum, weight) of measured users."""
        parts = []
        for metric, (total, weight) in self.sums.items():
            there = np.flatnonzero(weight > 0)
            users = np.asarray(self.users, dtype=object)[there]
            parts.append(
                pa.table(
                    {
                        "metric": pa.array([metric] * len(there), pa.string()),
                        "user_id": pa.array(users.tolist(), pa.string()),
                        "sum": total[there],
                        "weight": weight[there],
                    }
                )
            )
        return pa.concat_tables(parts)

    @classmethod
    def read(cls, table: pa.Table) -> UserSums:
        """Invert `table`."""
        names = sorted(set(table.column("user_id").to_pylist()))
        number = {name: at for at, name in enumerate(names)}
        sums: dict[str, tuple[Floats, Floats]] = {}
        for row in table.to_pylist():
            metric = sums.setdefault(row["metric"], (np.zeros(len(names)), np.zeros(len(names))))
            metric[0][number[row["user_id"]]] = row["sum"]
            metric[1][number[row["user_id"]]] = row["weight"]
        return cls(tuple(names), sums)


Pairs = Sequence[tuple[UserSums, UserSums]]
"""Ranker and baseline of every seed."""


def difference(pairs: Pairs, metric: str, other: str | None = None) -> Difference | None:
    """Return metric minus the baseline's metric `other` (default: the same), in points.

    The bootstrap draws users, each with the clicks of all seeds; `Difference.interval` adds the
    spread over seeds. None if a run or its baseline did not measure it.
    """
    found: list[float] = []
    parts: list[tuple[Floats, Floats, Floats, NDArray[np.str_]]] = []
    for mine, theirs in pairs:
        ours, base = mine.sums.get(metric), theirs.sums.get(other or metric)
        if ours is None or base is None or not ours[1].any():
            return None
        assert mine.users == theirs.users, "rankers are compared on the same clicks"
        assert np.allclose(ours[1], base[1]), "rankers are compared with the same weights"
        weight = ours[1]
        there = weight > 0
        found.append(float((ours[0] - base[0]).sum() / weight.sum()))
        users = np.asarray(mine.users, dtype=str)[there]
        parts.append((ours[0][there] / weight[there], base[0][there] / weight[there],
                      weight[there], users))  # fmt: skip
    if not parts:
        return None
    left, right, weight, user = map(np.concatenate, zip(*parts, strict=True))
    boot = paired_bootstrap(left, right, user.tolist(), seed=SEED, weights=weight)
    return Difference(statistics.fmean(found), tuple(found), boot)


def mean_of(sums: Sequence[UserSums], metric: str) -> float | None:
    """Return a metric's mean over seeds, or None if a run lacks it."""
    means = [one.mean(metric) for one in sums]
    known = [value for value in means if value is not None]
    return statistics.fmean(known) if known and len(known) == len(means) else None


def flat(name: str, found: Difference) -> dict[str, float]:
    """Return a difference under stable keys: NAME, its intervals, and its value for each seed.

    `.low` and `.high` are the 95 % interval over users and seeds (with one seed over users alone),
    `.users_low` and `.users_high` that over users alone.
    """
    interval, boot = found.interval, found.bootstrap
    assert interval is not None and boot is not None, "every difference here is bootstrapped"
    return {
        name: found.mean,
        f"{name}.low": interval[0],
        f"{name}.high": interval[1],
        **_of_users(name, boot),
        **{f"{name}.seed_{number}": value for number, value in enumerate(found.seeds)},
    }


def _of_users(name: str, boot: BootstrapResult) -> dict[str, float]:
    return {
        f"{name}.users_low": boot.low,
        f"{name}.users_high": boot.high,
        f"{name}.p": boot.p_value,
    }

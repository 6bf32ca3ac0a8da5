"""Comparison of rows with their baseline: differences, spread over seeds, bootstrap over users.

Only seeds of both are compared.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.stats import t as student_t

from karma_ray import recipes
from karma_ray.metrics.significance import BootstrapResult
from karma_ray.report.record import number
from karma_ray.studies.intervals import Intervals
from karma_ray.studies.records import Record
from karma_ray.studies.rows import Row

METRICS = (
    "gAUC", "HR@10", "HR@50", "HR@200", "HR@1000", "NDCG@10", "JS@50", "cold/HR@50",
    "in_query/HR@10", "held_out/HR@50", "paraphrased/HR@10", "paraphrased/HR@50",
    "paraphrased/HR@200",
)  # fmt: skip
"""Compared metrics, which are also kept as values per example."""
_NORMAL = (1.960, 0.842)
"""Normal quantiles for a two-sided 5 % level and for 80 % power."""


@dataclass(frozen=True)
class Variant:
    """One row under one setting, with a record per seed."""

    row: Row
    label: str
    key: str
    """`records.run_key` of its configuration."""
    records: Mapping[int, Record]
    intervals: Intervals
    """The source of its bootstrap intervals."""
    tried: int = 1
    """Number of settings from which it was chosen."""

    @property
    def searched(self) -> str:
        """The settings that a search has chosen."""
        return ", ".join(next(iter(self.records.values())).get("searched", []))

    @property
    def is_counted(self) -> bool:
        """Whether nothing is trained, so that one seed's record holds for every seed."""
        return self.row.built_from not in recipes.TRAINED

    def record_of(self, seed: int) -> int | None:
        """Return the seed whose record is used for `seed`, or None."""
        if seed in self.records:
            return seed
        return next(iter(self.records), None) if self.is_counted else None

    def values(self, metric: str) -> dict[int, float]:
        """Return the test metric by seed."""
        found = {seed: number(r["metrics"].get(metric)) for seed, r in self.records.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, metric: str) -> float | None:
        """Return the mean over the seeds."""
        values = self.values(metric)
        return statistics.fmean(values.values()) if values else None


@dataclass(frozen=True)
class Group:
    """The compared variants of one data set under one condition."""

    data: str
    condition: str
    baseline: Variant | None
    variants: tuple[Variant, ...]

    @property
    def name(self) -> str:
        """Data and condition, as in a heading."""
        return f"{self.data}, {self.condition}" if self.condition else self.data

    def find(self, row: str) -> Variant | None:
        """Return the first variant of a row."""
        return next((v for v in self.variants if v.row.name == row), None)


@dataclass(frozen=True)
class Difference:
    """The difference of a row and the baseline in one metric, in points."""

    mean: float
    seeds: tuple[float, ...]
    """The difference for each seed of both."""
    bootstrap: BootstrapResult | None
    """Bootstrap over users with pooled seeds; None without values per example."""
    gone: tuple[str, ...] = ()
    """Runs without values per example, whose seeds are not part of the bootstrap."""

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds."""
        return statistics.stdev(self.seeds) if len(self.seeds) > 1 else None

    @property
    def is_unknown(self) -> bool:
        """Whether an interval is expected but its values are missing."""
        return self.bootstrap is None and bool(self.gone)

    @property
    def is_saturated(self) -> bool:
        """Whether no example differs, for instance if K is the size of the catalogue."""
        found = self.bootstrap
        return found is not None and found.low == found.high == 0 and not any(self.seeds)

    @property
    def errors(self) -> tuple[float, float] | None:
        """Standard errors of the mean due to users and to seeds (0 with one seed); None without
        values per example."""
        if self.bootstrap is None:
            return None
        of_users = (self.bootstrap.high - self.bootstrap.low) / (2 * _NORMAL[0])
        spread = self.spread
        return of_users, 0.0 if spread is None else spread / math.sqrt(len(self.seeds))

    @property
    def detectable(self) -> float | None:
        """Smallest difference found in about four of five repetitions at the 5 % level."""
        return self._reach(sum(_NORMAL), (0.975, 0.8))

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval over other users and other runs of both recipes; with one seed over
        other users alone."""
        reach = self._reach(_NORMAL[0], (0.975,))
        return None if reach is None else (self.mean - reach, self.mean + reach)

    def _reach(self, normal: float, quantiles: tuple[float, ...]) -> float | None:
        """sqrt((z se_users)^2 + (t se_seeds)^2), where t is the sum of Student's `quantiles`."""
        if (errors := self.errors) is None:
            return None
        t = float(sum(student_t.ppf(quantiles, len(self.seeds) - 1))) if errors[1] else 0.0
        return math.hypot(normal * errors[0], t * errors[1])

    @property
    def over_seeds(self) -> tuple[float, float] | None:
        """95 % t interval over seeds; None with one seed."""
        if self.spread is None:
            return None
        number = len(self.seeds)
        half = float(student_t.ppf(0.975, number - 1)) * self.spread / math.sqrt(number)
        return self.mean - half, self.mean + half

    @property
    def direction(self) -> int:
        """1 or -1 if `interval` excludes 0, else 0."""
        found = self.interval
        if found is None or found[0] <= 0 <= found[1]:
            return 0
        return 1 if self.mean > 0 else -1

    @property
    def mark(self) -> str:
        """`*` for a significant difference, `(*)` if one seed shows it over users alone."""
        if not self.direction:
            return ""
        return "*" if len(self.seeds) > 1 else "(*)"


def difference(row: Variant, baseline: Variant, metric: str) -> Difference | None:
    """Return row minus baseline over the seeds of both, or None without such seeds."""
    mine, theirs = row.values(metric), baseline.values(metric)
    seeds = [
        (one, other)
        for seed in sorted({*row.records, *baseline.records})
        if (one := row.record_of(seed)) in mine and (other := baseline.record_of(seed)) in theirs
    ]
    if not seeds:
        return None
    each = tuple(mine[one] - theirs[other] for one, other in seeds)
    pairs = [(row.records[one], baseline.records[other]) for one, other in seeds]
    bootstrap = row.intervals.of(pairs, metric)
    gone = row.intervals.gone(pairs, metric)
    return Difference(statistics.fmean(each), each, bootstrap, gone)

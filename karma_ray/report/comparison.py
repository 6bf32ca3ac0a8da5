"""Rows of a table against their baseline: differences, spread over seeds, bootstrap over users.

Only records that were made under the same settings on the same data are compared, and only seeds
that both have.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t

from karma_ray import recipes
from karma_ray.metrics.significance import BootstrapResult, paired_bootstrap
from karma_ray.report.record import number
from karma_ray.report.results import Record, baseline_key, chosen, outcomes_of, record_key
from karma_ray.report.rows import Row, Table
from karma_ray.training.config import EXECUTION
from karma_ray.training.outcomes import Outcomes

METRICS = (
    "gAUC", "HR@10", "HR@50", "HR@200", "HR@1000", "JS@50", "cold/HR@50", "in_query/HR@10",
)  # fmt: skip
"""Compared metrics; values per example are kept for all of them."""
SEARCHED = "each row at its best setting"
"""Condition of a group whose trained rows had a search of their own."""
_NORMAL = (1.960, 0.842)
"""Quantiles of a two-sided 5 % level and of 80 % power."""


@dataclass(frozen=True)
class Variant:
    """One row under one setting: its records, one a seed."""

    row: Row
    label: str
    key: str
    """`results.run_key` of its configuration."""
    records: Mapping[int, Record]
    outcomes: Mapping[int, Outcomes]
    tried: int = 1
    """Settings that it was chosen from."""

    @property
    def searched(self) -> str:
        """The settings that a search gave it."""
        return ", ".join(next(iter(self.records.values())).get("searched", []))

    @property
    def is_counted(self) -> bool:
        """Whether nothing is trained: one seed's record then stands for every seed."""
        return self.row.built_from not in recipes.TRAINED

    def record_of(self, seed: int) -> int | None:
        """The seed whose record speaks for `seed`; None where there is none."""
        if seed in self.records:
            return seed
        return next(iter(self.records), None) if self.is_counted else None

    def values(self, metric: str) -> dict[int, float]:
        """Seed -> test metric."""
        found = {seed: number(r["metrics"].get(metric)) for seed, r in self.records.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, metric: str) -> float | None:
        """Mean over the seeds."""
        values = self.values(metric)
        return statistics.fmean(values.values()) if values else None


@dataclass(frozen=True)
class Group:
    """What is compared: one data set under one condition."""

    data: str
    condition: str
    baseline: Variant | None
    variants: tuple[Variant, ...]

    @property
    def name(self) -> str:
        """Data and condition, as a heading has them."""
        return f"{self.data}, {self.condition}" if self.condition else self.data

    def find(self, row: str) -> Variant | None:
        """The first variant of a row."""
        return next((v for v in self.variants if v.row.name == row), None)


@dataclass(frozen=True)
class Difference:
    """Row minus baseline in one metric, in points."""

    mean: float
    seeds: tuple[float, ...]
    """The difference of each seed that both have."""
    bootstrap: BootstrapResult | None
    """Over users, the seeds pooled; None without values per example."""

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds."""
        return statistics.stdev(self.seeds) if len(self.seeds) > 1 else None

    @property
    def is_saturated(self) -> bool:
        """Whether no example differs, as where K reaches the size of the catalogue."""
        found = self.bootstrap
        return found is not None and found.low == found.high == 0 and not any(self.seeds)

    @property
    def errors(self) -> tuple[float, float] | None:
        """Standard errors of the mean from drawing other users, and from drawing other seeds (0
        where one seed cannot say); None without values per example."""
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
        """95 % interval for other users and other runs of both recipes at once; with one seed for
        other users alone."""
        reach = self._reach(_NORMAL[0], (0.975,))
        return None if reach is None else (self.mean - reach, self.mean + reach)

    def _reach(self, normal: float, quantiles: tuple[float, ...]) -> float | None:
        """sqrt((z se_users)^2 + (t se_seeds)^2), t the sum of Student's `quantiles`."""
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
        """1 or -1 where `interval` excludes 0, else 0."""
        found = self.interval
        if found is None or found[0] <= 0 <= found[1]:
            return 0
        return 1 if self.mean > 0 else -1

    @property
    def mark(self) -> str:
        """`*` where a difference is shown, `(*)` where one seed shows it for other users alone."""
        if not self.direction:
            return ""
        return "*" if len(self.seeds) > 1 else "(*)"


def grouped(records: Iterable[Record], results: Path, table: Table) -> list[Group]:
    """The table's records by data and condition, rows in the table's order."""
    rows = {row.name: row for row in table.rows}
    recipe = rows[table.baseline].built_from
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.get("row") in rows and (key := baseline_key(record, recipe)):
            found.setdefault((record["data"], key), []).append(record)
    result = []
    for (data, key), members in sorted(found.items()):
        condition = _condition(members, recipe)
        plain = [record for record in members if not record.get("searched")]
        if plain:
            variants = _variants(plain, rows, recipe, results)
            base = [v for v in variants if v.row.name == table.baseline and v.key == key]
            result.append(Group(data, condition, base[0] if base else None, variants))
        if len(plain) < len(members):
            best, tried = chosen(members)
            variants = tuple(
                replace(v, tried=tried.get(v.row.name, 1))
                for v in _variants(best, rows, recipe, results)
            )
            base = [v for v in variants if v.row.name == table.baseline]
            told = ", ".join(part for part in (condition, SEARCHED) if part)
            result.append(Group(data, told, base[0] if base else None, variants))
    return _told_apart(result)


def difference(row: Variant, baseline: Variant, metric: str) -> Difference | None:
    """Row minus baseline over the seeds that both have; None where there is none."""
    mine, theirs = row.values(metric), baseline.values(metric)
    pairs = [
        (one, other)
        for seed in sorted({*row.records, *baseline.records})
        if (one := row.record_of(seed)) in mine and (other := baseline.record_of(seed)) in theirs
    ]
    if not pairs:
        return None
    each = tuple(mine[one] - theirs[other] for one, other in pairs)
    return Difference(statistics.fmean(each), each, _bootstrap(row, baseline, metric, pairs))


def _bootstrap(
    row: Variant, baseline: Variant, metric: str, pairs: list[tuple[int, int]]
) -> BootstrapResult | None:
    """Users drawn with replacement, each with its examples under all seeds; `pairs` are the seeds
    of the row's and of the baseline's record."""
    parts = []
    for one, other in pairs:
        mine, theirs = row.outcomes.get(one), baseline.outcomes.get(other)
        names = {row.records[one].get("examples"), baseline.records[other].get("examples")}
        if mine is None or theirs is None or len(names) > 1:
            return None
        left, right = mine.values(metric), theirs.values(metric)
        if left is None or right is None or not _per_click(row.records[one]):
            return None
        parts.append((left[0], right[0], left[1], left[2]))
    mine_all, theirs_all, users, weights = map(np.concatenate, zip(*parts, strict=True))
    return paired_bootstrap(mine_all, theirs_all, users.tolist(), seed=0, weights=weights)


def _per_click(record: Record) -> bool:
    """What is kept per example is per click: the mean over requests is another number."""
    return bool(record["config"].get("evaluation", {}).get("hr_unit", "click") == "click")


def _variants(
    members: list[Record], rows: Mapping[str, Row], recipe: str, results: Path
) -> tuple[Variant, ...]:
    by_run: dict[tuple[str, str], list[Record]] = {}
    for record in members:
        by_run.setdefault((record["row"], record_key(record)), []).append(record)
    found = []
    for name, row in rows.items():
        of_row = {key: found for (row_name, key), found in by_run.items() if row_name == name}
        for key, records in of_row.items():
            records.sort(key=lambda record: record["seed"])
            told = [a for a in _settings(records[0]) if not _matters(records[0], recipe, a)]
            label = ", ".join([row.title, *(told if len(of_row) > 1 else [])])
            outcomes = {r["seed"]: o for r in records if (o := outcomes_of(r, results))}
            found.append(Variant(row, label, key, {r["seed"]: r for r in records}, outcomes))
    return tuple(found)


def _settings(record: Record) -> list[str]:
    """--set of a record, without what only says how it ran."""
    return [a for a in record.get("set", []) if a.split("=")[0].strip() not in EXECUTION]


@functools.lru_cache(maxsize=4096)
def _key(assignments: tuple[str, ...], data_hash: str | None, recipe: str) -> str:
    return baseline_key({"assignments": assignments, "data_hash": data_hash}, recipe)


def _matters(record: Record, recipe: str, assignment: str) -> bool:
    """Whether the baseline would be another one without this assignment."""
    all_of_them = tuple(record.get("assignments", []))
    rest = tuple(a for a in all_of_them if a != assignment)
    data = record.get("data_hash")
    return _key(all_of_them, data, recipe) != _key(rest, data, recipe)


def _condition(members: list[Record], recipe: str) -> str:
    """What was set, as far as the baseline depends on it."""
    told = dict.fromkeys(
        assignment
        for record in members
        for assignment in _settings(record)
        if _matters(record, recipe, assignment)
    )
    return ", ".join(told)


def _told_apart(groups: list[Group]) -> list[Group]:
    """Groups of one data set whose conditions read the same get a number: settings that are not
    in --set (the study's own) have changed between them."""
    seen: dict[tuple[str, str], int] = {}
    result = []
    for group in groups:
        place = (group.data, group.condition)
        seen[place] = seen.get(place, 0) + 1
        number_of = seen[place]
        told = f"{group.condition or 'study settings'} ({number_of})"
        condition = group.condition if number_of == 1 else told
        result.append(Group(group.data, condition, group.baseline, group.variants))
    return result

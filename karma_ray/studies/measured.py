"""The best trial of a search beside the settings that all trials shared, on the test split.

Both are trained with seeds that the search has not used, so the choice of the trial favours
neither. Every run leaves a record in `OUT/measured`, and those that have one are not repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from karma_ray.artifacts import exists, join, read_json, write_json
from karma_ray.config import Config, override
from karma_ray.errors import KarmaRayError
from karma_ray.studies.comparison import METRICS, Variant, difference
from karma_ray.studies.intervals import Intervals
from karma_ray.studies.ledger import Compared, Measured, Search, assignments
from karma_ray.studies.machine import Machine
from karma_ray.studies.plan import Data
from karma_ray.studies.record_files import finished_record
from karma_ray.studies.records import read_records
from karma_ray.studies.rows import Row
from karma_ray.studies.study import run_study
from karma_ray.studies.trial import Trial

LOG = logging.getLogger(__name__)
DEFAULT = "default"
"""The row of the settings that all trials shared."""


def measure(
    result: Search, base: Config, data: Data, machine: Machine, *, out: str, seeds: int, cache: str,
    concurrent: int,
) -> Measured:  # fmt: skip
    """Measure the best trial of the search in `out`, and the default, with `seeds` seeds each.

    `base` is the configuration that the trials shared, with checkpoints that every machine can
    read. Raises KarmaRayError when a run fails.
    """
    results = join(out, "measured")
    chosen = tuple(range(base.seed + 1, base.seed + 1 + seeds))
    best = override(base, assignments(result.best.values))
    rows = {DEFAULT: base, f"trial-{result.best.name}": best}
    trials = [
        Trial(row, replace(config, seed=seed), ())
        for seed in chosen
        for row, config in rows.items()
    ]
    LOG.info("measuring trial %s beside the default: %d runs", result.best.name, len(trials))
    outcome = run_study(
        trials, data, results, machine, runs=join(results, "runs"), cache=cache,
        concurrent=concurrent,
    )  # fmt: skip
    if outcome.failed:
        name, reason = next(iter(outcome.failed.items()))
        raise KarmaRayError(
            f"the search has ended, but {len(outcome.failed)} of {len(trials)} measurements on "
            f"test failed, {name} with: {reason}; the same command tries them again"
        )
    found = Measured(result.best.name, chosen, _compared(trials, data, results))
    write_json(asdict(found), _file(out))
    return found


def read_measured(out: str, trial: str) -> Measured | None:
    """Return the comparison of this trial, or None when `out` has none."""
    if not exists(_file(out)) or (found := read_json(_file(out)))["trial"] != trial:
        return None
    lines = [{**one, "interval": _pair(one["interval"])} for one in found["compared"]]
    return Measured(trial, tuple(found["seeds"]), tuple(Compared(**line) for line in lines))


def _file(out: str) -> str:
    return join(out, "measured", "comparison.json")


def _compared(trials: Sequence[Trial], data: Data, results: str) -> tuple[Compared, ...]:
    records, intervals = read_records(results), Intervals(results)
    by_row: dict[str, dict[int, Mapping[str, Any]]] = {}
    for trial in trials:
        record = finished_record(trial, data, records)
        assert record is not None, "every trial has run"
        by_row.setdefault(trial.row, {})[trial.config.seed] = record
    default, best = (
        Variant(Row(row, row, trials[0].config.recipe), row, row, of_row, intervals)  # type: ignore[arg-type]
        for row, of_row in by_row.items()
    )
    compared = []
    for metric in METRICS:
        ours, theirs = best.mean(metric), default.mean(metric)
        if ours is None or theirs is None or (found := difference(best, default, metric)) is None:
            continue
        compared.append(Compared(metric, theirs, ours, found.mean, found.interval, found.mark))
    intervals.save(records)
    return tuple(compared)


def _pair(found: Sequence[float] | None) -> tuple[float, float] | None:
    return None if found is None else (found[0], found[1])

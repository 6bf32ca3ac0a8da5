"""The trials of a search as files, so that an interrupted search goes on.

`OUT/search.json` says what is searched. `OUT/trials/NAME.json` holds the values, validations and
end of a trial, whose run is `OUT/trials/NAME/`. Only the process that drives the search writes.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from karma_ray.artifacts import (
    SCHEMA_VERSION,
    content_hash,
    exists,
    join,
    open_filesystem,
    read_json,
    write_json,
)
from karma_ray.config import Config, flattened, override, to_dict
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.report.record import number
from karma_ray.training.checkpoints.outage import retried
from karma_ray.training.config import EXECUTION

End = Literal["unfinished", "ran to its end", "stopped early", "failed"]
Point = Mapping[str, float]
"""The metrics of one validation, and its `step`."""


@dataclass(frozen=True)
class Trial:
    """One setting and what is known of its run."""

    name: str
    values: Mapping[str, Any]
    """Drawn values by dotted path."""
    curve: tuple[Point, ...] = ()
    ended: End = "unfinished"
    failures: int = 0
    """How often it failed, including the last time."""
    error: str | None = None
    """The reason of the last failure."""

    @property
    def step(self) -> int:
        """The last validated step, or 0."""
        return int(self.curve[-1]["step"]) if self.curve else 0

    def value(self, metric: str) -> float | None:
        """Return the metric's last value, or None."""
        return self.curve[-1].get(metric) if self.curve else None


@dataclass(frozen=True)
class Compared:
    """One test metric of the best trial and the default, in percent; differences in points."""

    metric: str
    default: float
    best: float
    """Both are means over the seeds."""
    difference: float
    interval: tuple[float, float] | None
    """95 % interval over other users and other seeds."""
    mark: str
    """As in the tables of a study: `*` if the interval excludes 0."""


@dataclass(frozen=True)
class Measured:
    """A trial beside the default on the test split."""

    trial: str
    seeds: tuple[int, ...]
    compared: tuple[Compared, ...]
    """Nothing if the data have no test examples."""

    def rows(self) -> list[list[str]]:
        """Return the table, with its header first."""
        header = ["test", "default", f"trial {self.trial}", "difference", "95 % interval"]
        return [header, *(_compared_row(one) for one in self.compared)]


@dataclass(frozen=True)
class Search:
    """A finished search; `best` reached the last step, unless no trial did."""

    metric: str
    base: Config
    """The configuration that all trials share."""
    trials: tuple[Trial, ...]
    best: Trial
    distributions: Mapping[str, str]
    """Optuna's distribution of every drawn field, as JSON."""
    measured: Measured | None = None
    """The best trial beside the default on test, if that was asked for."""

    def flags(self) -> str:
        """Return the best configuration as flags of `jobs/train.py`."""
        return " ".join(
            f"--set {shlex.quote(assignment)}" for assignment in assignments(self.best.values)
        )

    def config(self) -> Config:
        """Return the configuration of the best trial."""
        return override(self.base, assignments(self.best.values))

    def saved_share(self) -> float:
        """Return the share of all trials' steps that were not run, as trials were stopped early.

        Failed and unfinished trials are not counted.
        """
        whole = [t for t in self.trials if t.ended in ("ran to its end", "stopped early")]
        steps = self.base.training.steps * len(whole)
        return 1 - sum(min(t.step, self.base.training.steps) for t in whole) / max(1, steps)


class Ledger:
    """The files of one search."""

    def __init__(self, out: str) -> None:
        self.out = out

    @staticmethod
    def check(out: str, facts: Mapping[str, Any]) -> None:
        """Raise InputError, naming the first differences, if a folder holds another search than
        the one that `facts` describe, or a run."""
        if exists(join(out, "config.json")):
            raise InputError("--out", out, "holds a run; a search needs a folder for itself")
        uri = join(out, "search.json")
        if exists(uri) and (found := _differences(read_json(uri), facts)):
            told = "; ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
            raise InputError("--out", out, f"holds another search, choose a new one: {told}")

    @classmethod
    def open(cls, out: str, facts: Mapping[str, Any]) -> Ledger:
        """Open a folder for a search, after `check`."""
        cls.check(out, facts)
        write_json(facts, join(out, "search.json"))  # anew, as more trials may be asked for
        return cls(out)

    def run_of(self, name: str) -> str:
        """Return the run folder of a trial."""
        return join(self.out, "trials", name)

    def trials(self) -> list[Trial]:
        """Read all trials, in the order of their start."""
        fs, path = open_filesystem(join(self.out, "trials"))
        fs.invalidate_cache()
        files = sorted(file for file in fs.ls(path, detail=False) if file.endswith(".json")) if (
            fs.exists(path)
        ) else []  # fmt: skip
        read = [read_json(join(self.out, "trials", file.rsplit("/", 1)[-1])) for file in files]
        return [Trial(**{**found, "curve": tuple(found["curve"])}) for found in read]

    def write(self, trial: Trial) -> None:
        """Write or replace a trial."""
        retried(lambda: write_json(asdict(trial), f"{self.run_of(trial.name)}.json"))

    def finish(self, result: Search, space: str) -> None:
        """Write trials.json, best.json (for `jobs/train.py --config`) and the manifest."""
        write_json(to_dict(result.config()), join(self.out, "best.json"))
        write_json(
            {
                "metric": result.metric,
                "best": result.best.name,
                "flags": result.flags(),
                "saved_share": round(result.saved_share(), 4),
                "trials": [_row(trial, result.metric) for trial in result.trials],
            },
            join(self.out, "trials.json"),
        )
        # The trials are whole runs with their own manifests; the search consists of its table.
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": "search",
            "content_hash": content_hash(join(self.out, "trials.json")),
            "parents": {},
            "space": space,
            "metric": result.metric,
        }
        write_json(manifest, join(self.out, "manifest.json"))


def facts_of(
    base: Config, metric: str, distributions: Mapping[str, str], data: str | None
) -> dict[str, Any]:
    """Return what identifies a search; `data` is the hash of its data."""
    return {
        "metric": metric, "fields": dict(distributions), "data": data, "base": to_dict(base),
    }  # fmt: skip


def assignments(values: Mapping[str, Any]) -> list[str]:
    """Return drawn values as `dotted.path=value` strings, which `--set` reads back exactly."""
    return [f"{path}={value}" for path, value in values.items()]


def best_of(trials: list[Trial], metric: str) -> Trial:
    """Return the trial to take; raises KarmaRayError when none ended with a number."""
    done = [t for t in trials if t.ended != "failed" and number(t.value(metric)) is not None]
    if not done:
        reason = trials[0].error or f"{metric} of {trials[0].value(metric)}"
        raise KarmaRayError(f"every trial failed; the first one with: {reason}")
    return max(done, key=lambda trial: _rank(trial, metric))


def describe(result: Search) -> str:
    """Return the table of trials, best first, and the flags that repeat the best one."""
    names = list(result.best.values)
    rows = [["trial", *names, result.metric, "step", "ended"]]
    for trial in ranked(result):
        value = trial.value(result.metric)
        drawn = [shown(trial.values.get(name)) for name in names]
        told = "–" if value is None else f"{value:.2f}"
        # A trial that failed once and then ran to its end keeps its error, which no longer counts.
        end = trial.error if trial.ended == "failed" and trial.error else trial.ended
        rows.append([trial.name, *drawn, told, str(trial.step), end])
    saved = f"stopping weak trials early saved {100 * result.saved_share():.0f} % of the steps"
    lines = [*_aligned(rows), "", saved, f"best  {result.flags()}"]
    if (found := result.measured) is not None:
        seeds = f"seed{'s' * (len(found.seeds) > 1)} {', '.join(map(str, found.seeds))}"
        lines += ["", f"Measured on test with {seeds}; * if the interval excludes 0:"]
        lines += _aligned(found.rows()) if found.compared else ["there are no test examples"]
    return "\n".join(lines)


def ranked(result: Search) -> list[Trial]:
    """Return the trials, best first."""
    return sorted(result.trials, key=lambda trial: _rank(trial, result.metric), reverse=True)


def shown(value: object) -> str:
    """Format a drawn value for a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _compared_row(one: Compared) -> list[str]:
    interval = "–" if one.interval is None else "[{:+.2f}, {:+.2f}]".format(*one.interval)
    told = f"{one.difference:+.2f} {one.mark}".rstrip()
    return [one.metric, f"{one.default:.2f}", f"{one.best:.2f}", told, interval]


def _rank(trial: Trial, metric: str) -> tuple[bool, bool, float]:
    """Sort key: failed trials last, completed ones before stopped ones, then by the metric."""
    value = number(trial.value(metric))  # comparisons with NaN are always false
    ended = trial.ended == "ran to its end"
    return trial.ended != "failed", ended, -math.inf if value is None else value


def _row(trial: Trial, metric: str) -> dict[str, Any]:
    return {
        "name": trial.name, "values": dict(trial.values), "value": trial.value(metric),
        "step": trial.step, "ended": trial.ended, "failures": trial.failures,
        "error": trial.error,
    }  # fmt: skip


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return `name: before, now after` for every difference between the facts of two searches."""

    def named(facts: Mapping[str, Any]) -> dict[str, Any]:
        base = {n: v for n, v in flattened(facts["base"]) if n not in EXECUTION}
        drawn = {f"SPACE {path}": text for path, text in facts["fields"].items()}
        return {"METRIC": facts["metric"], "--data": facts["data"], **drawn, **base}

    # Tuples of a configuration are lists in JSON, hence compared as texts.
    before, after = named(there), named(now)
    return [
        f"{name} was {before.get(name, 'absent')!s}, now {after.get(name, 'absent')!s}"
        for name in dict.fromkeys([*before, *after])
        if _text(before.get(name)) != _text(after.get(name))
    ]


def _text(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)

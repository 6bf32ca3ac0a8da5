"""A study: rows of a table and seeds on one data set; every finished run writes a record.

Trials of a seed share their first stages, which are computed before them. Runs with a record are
not repeated, and an interrupted run continues from its newest checkpoint, so a study can be
stopped at any time and continued, also on another machine. A `Machine` computes: a cluster of Ray
(cluster/study.py), or this machine alone (here.py).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from karma_ray.artifacts import absolute
from karma_ray.config import Config, override
from karma_ray.errors import InputError
from karma_ray.runs.continuation import check_sizes
from karma_ray.runs.executor import Executor
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.studies.machine import Machine, Task
from karma_ray.studies.plan import Data
from karma_ray.studies.progress import note_study
from karma_ray.studies.record_files import (
    commit,
    finished_record,
    run_folder,
    write_found,
    write_record,
)
from karma_ray.studies.records import read_records
from karma_ray.studies.trial import Trial, first_stage, first_stage_key, train_trial

LOG = logging.getLogger(__name__)
STATUS_SECONDS = 60.0


@dataclass
class Outcome:
    """The end of a study: names of trials that existed, finished, failed, or are left."""

    there: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def told(self) -> str:
        """Return a summary in one line."""
        parts = [f"{len(self.done)} made", f"{len(self.there)} already there"]
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += [f"{len(self.left)} left: {', '.join(self.left)}"] if self.left else []
        return "; ".join(parts)


def run_study(
    trials: Sequence[Trial],
    data: Data,
    results: str | Path,
    machine: Machine,
    *,
    runs: str,
    cache: str,
    concurrent: int | None = None,
    max_minutes: float | None = None,
) -> Outcome:
    """Run trials without a record, `concurrent` at a time (default: the machine's own number).

    After `max_minutes` running trials are stopped too; the next call continues them. Raises
    InputError on limits that are not positive.
    """
    if concurrent is not None and concurrent < 1:
        raise InputError("--concurrent", concurrent, "must be at least 1")
    if max_minutes is not None and max_minutes <= 0:
        raise InputError("--max-minutes", max_minutes, "must be above 0")
    outcome = Outcome()
    commit()  # cached now, because commits may be made while this runs
    known = read_records(results)
    missing: list[Trial] = []
    for trial in trials:
        record = finished_record(trial, data, known)
        if record is None:
            missing.append(trial)
            continue
        if record["row"] != trial.row:
            write_found(trial, {k: v for k, v in record.items() if k != "searched"}, data, results)
        LOG.info("%s already has a record", trial.name)
        outcome.there.append(trial.name)
    if missing:
        machine.open()
        prepare(missing, data, machine.executor)
        slots = min(concurrent or machine.possible_trials(), len(missing))
        folders = absolute(runs), absolute(cache)
        note_study(folders[0], [run_folder(trial, data, folders[0]) for trial in missing])
        _Queue(machine, slots, missing, data, results, *folders, outcome).work(max_minutes)
    return outcome


def prepare(trials: Iterable[Trial], data: Data, executor: Executor) -> None:
    """Prepare the data and check every configuration against them; raises InputError."""
    for trial in trials:
        source = ensure_prepared(data.uri, trial.config.prepare, executor.prepare)
        check_sizes(trial.config, source, with_warmup=True)


class _Queue:
    """Runs first stages and trials, as many at a time as there are slots."""

    def __init__(
        self, machine: Machine, slots: int, trials: Sequence[Trial], data: Data,
        results: str | Path, runs: str, cache: str, outcome: Outcome,
    ) -> None:  # fmt: skip
        self.machine, self.slots = machine, slots
        self.data, self.results, self.runs, self.cache = data, results, runs, cache
        self.outcome, self.waiting, self.total = outcome, list(trials), len(trials)
        self.threads = max(1, (os.cpu_count() or 1) // self.slots)
        self.keys = {trial.name: first_stage_key(trial.config, data.uri) for trial in trials}
        self.stages: dict[str, bool] = {}  # key -> made
        self.running: dict[Task, tuple[str, Trial, float]] = {}  # task -> (stage key or "", ...)
        self.seconds: list[float] = []

    def work(self, max_minutes: float | None) -> None:
        """Run until no trial waits, or the time is over."""
        deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
        told = time.monotonic()
        try:
            while (self.waiting or self.running) and time.monotonic() < deadline:
                while len(self.running) < self.slots and self._start():
                    pass
                patience = min(5.0, max(0.0, deadline - time.monotonic()))
                for task in self.machine.ended(list(self.running), patience):
                    self._finish(task)
                if time.monotonic() - told > STATUS_SECONDS:
                    told = time.monotonic()
                    self._tell()
        finally:
            for task in self.machine.stop(list(self.running)):
                self._finish(task)
        stopped = [trial for stage, trial, _ in self.running.values() if not stage]
        self.outcome.left = [trial.name for trial in [*stopped, *self.waiting]]

    def _start(self) -> bool:
        """Start the first trial whose first stage is ready, or a first stage; False if neither."""
        for trial in self.waiting:
            key = self.keys[trial.name]
            if key not in self.stages:
                self.stages[key] = False
                self._run(key, trial, first_stage, trial.config, self.data.uri, self.cache)
                LOG.info("first stages of seed %d start", trial.config.seed)
                return True
            if self.stages[key]:
                self.waiting.remove(trial)
                folder, config = self._folder(trial), self._placed(trial)
                self._run("", trial, train_trial, config, self.data.uri, folder, self.cache)
                LOG.info("%s starts", trial.name)
                return True
        return False

    def _run(self, stage: str, trial: Trial, function: Callable[..., Any], *given: Any) -> None:
        task = self.machine.start(function, [*given, self.machine.executor], self.slots)
        self.running[task] = (stage, trial, time.monotonic())

    def _finish(self, task: Task) -> None:
        stage, trial, started = self.running.pop(task)
        took = time.monotonic() - started
        try:
            found = self.machine.result(task)
        except Exception as error:
            reason = str(error).strip().splitlines()[-1]
            LOG.error("%s failed: %s", "first stages of " * bool(stage) + trial.name, reason)
            if stage:
                lost = [t for t in self.waiting if self.keys[t.name] == stage]
                self.waiting = [t for t in self.waiting if t not in lost]
                self.outcome.failed.update({t.name: reason for t in lost})
            else:
                self.outcome.failed[trial.name] = reason
            return
        if stage:
            self.stages[stage] = True
            LOG.info("first stages of seed %d are ready, %.0f s", trial.config.seed, took)
            return
        self.seconds.append(took)
        self.outcome.done.append(trial.name)
        write_record(trial, found, self.data, self.results)
        LOG.info(
            "%s finished in %.0f s: HR@50 %.1f, %d of %d trials, about %.0f minutes left",
            trial.name, took, found["metrics"].get("HR@50", float("nan")),
            self.total - len(self.waiting) - self._num_trials(), self.total, self._left() / 60,
        )  # fmt: skip

    def _num_trials(self) -> int:
        return sum(not stage for stage, _, _ in self.running.values())

    def _left(self) -> float:
        """Estimate the remaining seconds from the mean of the finished trials."""
        mean = sum(self.seconds) / max(1, len(self.seconds))
        now = time.monotonic()
        begun = sum(min(mean, now - t) for stage, _, t in self.running.values() if not stage)
        work = mean * (len(self.waiting) + self._num_trials()) - begun
        return max(0.0, work) / self.slots

    def _tell(self) -> None:
        for stage, trial, _ in self.running.values():
            if not stage:
                LOG.info("%s %s", trial.name, trial.progress(self._folder(trial)))

    def _folder(self, trial: Trial) -> str:
        return run_folder(trial, self.data, self.runs)

    def _placed(self, trial: Trial) -> Config:
        """Return the trial's configuration with its share of the cores, unless threads are set."""
        field = "training.threads_per_worker"
        if any(assignment.startswith(f"{field}=") for assignment in trial.extra):
            return trial.config
        return override(trial.config, [f"{field}={self.threads}"])

"""A trial of a search: what its worker process does, and what the driver writes down of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from ray import tune

from karma_ray.artifacts import RunFolder, exists, read_lines
from karma_ray.config import Config, override
from karma_ray.errors import InputError
from karma_ray.report.record import number
from karma_ray.studies.ledger import Ledger, Trial, assignments

if TYPE_CHECKING:
    # A replaced objective needs none of the stages.
    from karma_ray.runs.joint import OnValidate

LOG = logging.getLogger(__name__)


class Train(Protocol):
    """A whole run, `karma_ray.runs.pipeline.train_run`, or a smaller objective."""

    def __call__(
        self, config: Config, data: str | None, out: str, /, *, resume: bool,
        on_validate: OnValidate,
    ) -> object: ...  # fmt: skip


def reported_value(metric: str, metrics: Mapping[str, float]) -> float:
    """Return the value of `valid/NAME` in a validation's metrics, with or without the prefix."""
    for name in (metric, metric.removeprefix("valid/")):
        if name in metrics:
            return float(metrics[name])
    raise InputError("METRIC", metric, choices=sorted(metrics))


def trainable(metric: str, base: Config, data: str | None, ledger: Ledger, train: Train) -> Any:
    """Return what Ray Tune runs for a setting: it trains in the run folder of the trial."""
    start = os.getcwd()

    def trial(setting: dict[str, Any]) -> None:
        from karma_ray.training.loop import without_bars

        # Ray Tune changes the working directory of each trial; relative paths (of a checkpoint or
        # the cache) refer to the folder where the search was started.
        if os.path.isdir(start):
            os.chdir(start)
        folder, told = RunFolder(ledger.run_of(setting["name"])), [0]

        def on_validate(step: int, metrics: Mapping[str, float]) -> None:
            told.append(step)
            point = {name.removeprefix("valid/"): value for name, value in metrics.items()}
            value = reported_value(metric, metrics)
            tune.report({metric: value, "step": step, "point": point})

        config = override(base, assignments(setting["values"]))
        resume = exists(folder.config)
        with without_bars():  # which could appear after the last words of the driver
            train(config, data, folder.root, resume=resume, on_validate=on_validate)
        # A run that ended just before the search was interrupted validates no more.
        for line in list(read_lines(folder.metrics_lines)):
            if line["stage"] == "valid" and line["step"] > max(told):
                numbers = {n: v for n, v in line.items() if number(v) is not None and n != "step"}
                on_validate(line["step"], numbers)

    return trial


def last_words(trial: Any) -> str:
    """Return the last line of a failed trial's traceback.

    Ray Tune writes it on the driver's disk before it tells its callbacks. `trial.get_error()`
    reads the copy in the storage, which is sent in the background and may not be there yet.
    """
    path = trial.error_file
    if path and os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().strip().splitlines()
        if lines:
            return lines[-1]
    return "unknown"


class Recorder(tune.Callback):
    """Writes every start, validation and end of a trial to the ledger, and logs them.

    `on_end` is called with all trials when one has ended.
    """

    def __init__(
        self, ledger: Ledger, metric: str, steps: int, on_end: Callable[[list[Trial]], None]
    ) -> None:
        self._ledger, self._metric, self._steps, self._on_end = ledger, metric, steps, on_end
        self._trials = {trial.name: trial for trial in ledger.trials()}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        found = self._of(trial)
        if found.step:
            LOG.info("trial %s  goes on after step %d", found.name, found.step)
        self._write(found)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        found, step, value = self._of(trial), result["step"], result[self._metric]
        # A trial that goes on from a checkpoint repeats the steps after it.
        kept = [point for point in found.curve if point["step"] < step]
        point = {**result["point"], self._metric: value, "step": step}
        self._write(replace(found, curve=(*kept, point)))
        LOG.info("trial %s  step %d  %s %.2f", found.name, step, self._metric, value)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        found = self._of(trial)
        whole = found.step >= self._steps
        self._write(replace(found, ended="ran to its end" if whole else "stopped early"))
        self._on_end(list(self._trials.values()))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        found = self._failed(trial)
        LOG.info("trial %s  failed and is tried again: %s", found.name, found.error)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        found = self._failed(trial)
        self._write(replace(found, ended="failed"))
        LOG.info("trial %s  failed: %s", found.name, found.error)
        self._on_end(list(self._trials.values()))

    def _failed(self, trial: Any) -> Trial:
        found = self._of(trial)
        found = replace(found, failures=found.failures + 1, error=last_words(trial))
        self._write(found)
        return found

    def _of(self, trial: Any) -> Trial:
        name = trial.config["name"]
        return self._trials.get(name) or Trial(name, trial.config["values"])

    def _write(self, trial: Trial) -> None:
        self._trials[trial.name] = trial
        self._ledger.write(trial)

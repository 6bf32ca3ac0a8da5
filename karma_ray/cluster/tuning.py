"""A search over configuration fields with Ray Tune: Optuna proposes values, ASHA stops trials.

Each trial is a whole run in its own worker process (`training.num_workers=0`) that reports every
validation. Trials are compared by a metric of the validation examples; the test examples have no
influence. What is known of each trial is kept by `studies/ledger.py`, not by Ray: an interrupted
search tells Optuna and ASHA what it has found, and goes on with unfinished runs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray import tune

from karma_ray import recipes
from karma_ray.artifacts import RunFolder, absolute, exists, open_filesystem, read_lines
from karma_ray.cluster.accelerators import GPU, gpu_share
from karma_ray.cluster.proposals import Settings, stopping_rule
from karma_ray.cluster.search_space import Space
from karma_ray.cluster.supply import supply
from karma_ray.config import Config, override
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.report.record import number
from karma_ray.studies.ledger import (
    Ledger,
    Search,
    Trial,
    assignments,
    best_of,
    facts_of,
)

if TYPE_CHECKING:
    # A replaced objective needs neither PyTorch nor the stages.
    from karma_ray.runs.joint import OnValidate

LOG = logging.getLogger(__name__)
RETRIES = 2
"""How often a failed trial is tried again, from its newest checkpoint."""


class Train(Protocol):
    """A whole run, `karma_ray.runs.pipeline.train_run`, or a smaller objective."""

    def __call__(
        self, config: Config, data: str | None, out: str, /, *, resume: bool,
        on_validate: OnValidate,
    ) -> object: ...  # fmt: skip


def search(
    space: Space,
    base: Config,
    *,
    data: str | None,
    trials: int,
    out: str,
    max_concurrent: int = 2,
    gpus_per_trial: float | None = None,
    train: Train | None = None,
    cache: str | None = None,
) -> Search:
    """Run trials of `base` with values drawn from `space`, until `trials` have ended in `out`.

    `base` already contains the space's fixed fields. Ray must have been started. Trials that an
    earlier call has left in `out` count. By default trials share the cluster's GPUs. `train`
    replaces the whole run by a smaller objective. `cache` is shared by the trials (default: as for
    a run in `out`). Raises InputError on wrong input, also if `out` holds another search, and
    KarmaRayError when it was interrupted or every trial failed.
    """
    _check(base, trials, max_concurrent, gpus_per_trial)
    base, out = _in_process(base), absolute(out)
    shared, data_hash = base, None
    if train is None:
        from karma_ray.runs.pipeline import train_run
        from karma_ray.runs.sources import cache_beside

        cache = absolute(cache or cache_beside(out))
        shared, data, data_hash = _prepared(space, base, data, cache)
        train = partial(train_run, cache=cache, is_tested=False)
    drawn = space.distributions()
    ledger = Ledger.open(out, facts_of(base, space.metric, drawn, data_hash))
    known = ledger.trials()
    left = trials - sum(trial.ended != "unfinished" for trial in known)
    if left > 0:
        if known:
            LOG.info("%d of %d trials have ended already", trials - left, trials)
        _run(space, shared, data, ledger, known, left, max_concurrent, gpus_per_trial, train)
    found = ledger.trials()
    ended = [trial for trial in found if trial.ended != "unfinished"]
    if len(ended) < trials:
        raise KarmaRayError(
            f"interrupted with {len(ended)} of {trials} trials; the same command with --out {out} "
            "goes on"
        )
    result = Search(space.metric, base, tuple(ended), best_of(ended, space.metric), drawn)
    ledger.finish(result, space.path)
    return result


def reported_value(metric: str, metrics: Mapping[str, float]) -> float:
    """Return the value of `valid/NAME` in a validation's metrics, with or without the prefix."""
    for name in (metric, metric.removeprefix("valid/")):
        if name in metrics:
            return float(metrics[name])
    raise InputError("METRIC", metric, choices=sorted(metrics))


def _check(base: Config, trials: int, max_concurrent: int, gpus_per_trial: float | None) -> None:
    for flag, count in (("--trials", trials), ("--concurrent", max_concurrent)):
        if count < 1:
            raise InputError(flag, count, "must be at least 1")
    if gpus_per_trial is not None and not 0 <= gpus_per_trial <= 1:
        raise InputError("--gpus-per-trial", gpus_per_trial, "must be from 0 to 1")
    if base.recipe not in recipes.TRAINED:
        raise InputError("--recipe", base.recipe, "trains nothing", choices=list(recipes.TRAINED))


def _in_process(base: Config) -> Config:
    """Let trials train in their own process and validate often enough to be stopped early."""
    changes = ["training.num_workers=0", "training.threads_per_worker=1"]
    if base.training.validate_every < 1:
        changes.append(f"training.validate_every={max(1, base.training.steps // 5)}")
    return override(base, changes)


def _prepared(space: Space, base: Config, data: str | None, cache: str) -> tuple[Config, str, str]:
    """Make data, pretraining and warm-up once, in the cache, before trials compete for them.

    Returns the configuration with checkpoints that the machines of all trials can read, and the
    data's folder and hash. Raises InputError on a metric that is never reported.
    """
    from karma_ray.cluster.sharding import ensure_prepared
    from karma_ray.runs.assessment import validation_metrics
    from karma_ray.runs.first_stages import start_stage
    from karma_ray.runs.plain_checkpoints import with_shared_checkpoints
    from karma_ray.runs.sources import toy_shop
    from karma_ray.studies.plan import Data

    shared = with_shared_checkpoints(base, cache)
    folder = Data.open(data or toy_shop(cache))
    source = ensure_prepared(folder.uri, base.prepare)
    reported_value(space.metric, validation_metrics(base, source))
    start_stage(shared, source, cache=cache)
    return shared, folder.uri, folder.hash


def _run(
    space: Space, base: Config, data: str | None, ledger: Ledger, known: Sequence[Trial],
    left: int, max_concurrent: int, gpus_per_trial: float | None, train: Train,
) -> None:  # fmt: skip
    # None of Ray's loggers is used: the ledger holds what trials report.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # which prints boxes also if told to be silent
    logging.getLogger("optuna").setLevel(logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it misses the files of those loggers
    if gpus_per_trial is None:
        gpus_per_trial = gpu_share(supply().reach(GPU).possible, max_concurrent)
    fs, path = open_filesystem(ledger.out)
    remote = {"storage_filesystem": PyFileSystem(FSSpecHandler(fs))} if "://" in ledger.out else {}
    tune.Tuner(
        tune.with_resources(
            _trainable(space.metric, base, data, ledger, train),
            {"cpu": base.training.num_threads(), "gpu": gpus_per_trial},
        ),
        tune_config=tune.TuneConfig(
            num_samples=left,
            max_concurrent_trials=max_concurrent,
            search_alg=Settings(space, base.seed, known),
            scheduler=stopping_rule(base, space.metric, known),
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=path,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[_Recorder(ledger, space.metric, base.training.steps)],
            **remote,
        ),
    ).fit()


def _trainable(metric: str, base: Config, data: str | None, ledger: Ledger, train: Train) -> Any:
    start = os.getcwd()

    def trial(setting: dict[str, Any]) -> None:
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
        train(config, data, folder.root, resume=resume, on_validate=on_validate)
        # A run that ended just before the search was interrupted validates no more.
        for line in list(read_lines(folder.metrics_lines)):
            if line["stage"] == "valid" and line["step"] > max(told):
                numbers = {n: v for n, v in line.items() if number(v) is not None and n != "step"}
                on_validate(line["step"], numbers)

    return trial


class _Recorder(tune.Callback):
    """Writes every start, validation and end of a trial to the ledger, and logs them."""

    def __init__(self, ledger: Ledger, metric: str, steps: int) -> None:
        self._ledger, self._metric, self._steps = ledger, metric, steps
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

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        found = self._failed(trial)
        LOG.info("trial %s  failed and is tried again: %s", found.name, found.error)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        found = self._failed(trial)
        self._write(replace(found, ended="failed"))
        LOG.info("trial %s  failed: %s", found.name, found.error)

    def _failed(self, trial: Any) -> Trial:
        found = self._of(trial)
        error = str(trial.get_error() or "unknown").strip().splitlines()[-1]
        found = replace(found, failures=found.failures + 1, error=error)
        self._write(found)
        return found

    def _of(self, trial: Any) -> Trial:
        name = trial.config["name"]
        return self._trials.get(name) or Trial(name, trial.config["values"])

    def _write(self, trial: Trial) -> None:
        self._trials[trial.name] = trial
        self._ledger.write(trial)

"""A search over configuration fields with Ray Tune: Optuna proposes values, ASHA stops trials.

Each trial is a whole run in its own worker process (`training.num_workers=0`) that reports every
validation. Trials are compared by a metric of the validation examples; the test examples have no
influence.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ray import tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from karma_ray import recipes
from karma_ray.artifacts import SCHEMA_VERSION, absolute, content_hash, join, write_json
from karma_ray.cluster.search_space import Space, assignments
from karma_ray.config import Config, override, to_dict
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.report.record import number

if TYPE_CHECKING:
    # A replaced objective needs neither PyTorch nor the stages.
    from karma_ray.runs.joint import OnValidate

LOG = logging.getLogger(__name__)


class Train(Protocol):
    """A whole run, `karma_ray.runs.pipeline.train_run`, or a smaller objective."""

    def __call__(
        self, config: Config, data: str | None, out: str, /, *, on_validate: OnValidate
    ) -> object: ...


@dataclass(frozen=True)
class Trial:
    """The result of one trial."""

    name: str
    values: dict[str, Any]
    value: float | None
    step: int
    stopped_early: bool
    error: str | None


@dataclass(frozen=True)
class Search:
    """A finished search; `best` reached the last step, unless no trial did."""

    metric: str
    trials: list[Trial]
    best: Trial

    def flags(self) -> str:
        """Return the best configuration as flags of `jobs/train.py`."""
        return " ".join(
            f"--set {shlex.quote(assignment)}" for assignment in assignments(self.best.values)
        )


def search(
    space: Space,
    base: Config,
    *,
    data: str | None,
    trials: int,
    out: str,
    max_concurrent: int = 2,
    train: Train | None = None,
    cache: str | None = None,
) -> Search:
    """Run `trials` trials of `base` with values drawn from `space`; write `out/trials.json`.

    `base` already contains the space's fixed fields. Ray must have been started. `train` replaces
    the whole run by a smaller objective. `cache` is shared by the trials (default: as for a run in
    `out`). Raises InputError on a count below 1, and KarmaRayError
    when every trial failed.
    """
    for flag, count in (("--trials", trials), ("--concurrent", max_concurrent)):
        if count < 1:
            raise InputError(flag, count, "must be at least 1")
    if base.recipe not in recipes.TRAINED:
        raise InputError("--recipe", base.recipe, "trains nothing", choices=list(recipes.TRAINED))
    # Of Ray's loggers only the JSON lines are used, as TensorBoard refuses the @ in metric names.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    base, out, data = _in_process(base), absolute(out), data and absolute(data)
    if train is None:
        base, train = _share_first_stages(base, data, out, cache)
    tuner = tune.Tuner(
        tune.with_resources(
            _trainable(space, base, data, out, train), {"cpu": base.training.num_threads()}
        ),
        param_space=dict(space.domains),
        tune_config=tune.TuneConfig(
            metric=space.metric,
            mode="max",
            num_samples=trials,
            max_concurrent_trials=max_concurrent,
            search_alg=OptunaSearch(seed=base.seed),
            scheduler=_scheduler(base),
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=_local(out),
            verbose=0,
            callbacks=[_Progress(space.metric), JsonLoggerCallback()],
        ),
    )
    result = _collect(space, base, tuner.fit())
    _write(result, space, base, out)
    return result


def describe(result: Search) -> str:
    """Return the table of trials, best first, and the flags that repeat the best one."""
    names = list(result.best.values)
    rows = [["trial", *names, result.metric, "step", "ended"]]
    for trial in sorted(result.trials, key=_rank, reverse=True):
        ended = trial.error or ("stopped early" if trial.stopped_early else "ran to its end")
        value = "–" if trial.value is None else f"{trial.value:.2f}"
        drawn = [_show(trial.values.get(name)) for name in names]
        rows.append([trial.name, *drawn, value, str(trial.step), ended])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", f"best  {result.flags()}"])


def reported_value(metric: str, metrics: Mapping[str, float]) -> float:
    """Return the value of `valid/NAME` in a validation's metrics, with or without the prefix."""
    for name in (metric, metric.removeprefix("valid/")):
        if name in metrics:
            return float(metrics[name])
    raise InputError("METRIC", metric, choices=sorted(metrics))


def _in_process(base: Config) -> Config:
    """Let trials train in their own process and validate often enough to be stopped early."""
    changes = ["training.num_workers=0", "training.threads_per_worker=1"]
    if base.training.validate_every < 1:
        changes.append(f"training.validate_every={max(1, base.training.steps // 5)}")
    return override(base, changes)


def _trainable(space: Space, base: Config, data: str | None, out: str, train: Train) -> Any:
    start = os.getcwd()

    def trial(values: dict[str, Any]) -> None:
        # Ray Tune changes the working directory of each trial; relative paths (of a checkpoint or
        # the cache) refer to the folder where the search was started.
        if os.path.isdir(start):
            os.chdir(start)
        run = join(out, "trials", tune.get_context().get_trial_id())

        def on_validate(step: int, metrics: Mapping[str, float]) -> None:
            tune.report({space.metric: reported_value(space.metric, metrics), "step": step})

        train(override(base, assignments(values)), data, run, on_validate=on_validate)

    return trial


def _share_first_stages(
    base: Config, data: str | None, out: str, cache: str | None
) -> tuple[Config, Train]:
    """Make data, pretraining and warm-up once, in the cache, before trials compete for them.

    Returns the configuration with checkpoints that the machines of all trials can read, and a whole
    run with this cache.
    """
    # Imported here, because a replaced objective does not need the pipeline.
    from karma_ray.cluster.sharding import ensure_prepared
    from karma_ray.runs.first_stages import start_stage
    from karma_ray.runs.pipeline import train_run
    from karma_ray.runs.plain_checkpoints import with_shared_checkpoints
    from karma_ray.runs.sources import cache_beside, toy_shop

    cache = absolute(cache or cache_beside(out))
    base = with_shared_checkpoints(base, cache)
    source = ensure_prepared(data or toy_shop(cache), base.prepare)
    start_stage(base, source, cache=cache)
    return base, partial(train_run, cache=cache)


def _scheduler(base: Config) -> ASHAScheduler:
    # max_t is after the last step, so that a trial which gets there ends by itself with its bundle.
    return ASHAScheduler(
        time_attr="step",
        max_t=base.training.steps + 1,
        grace_period=min(base.training.validate_every, base.training.steps),
        reduction_factor=2,
    )


class _Progress(tune.Callback):
    """Logs one line per validation and per failed trial."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        LOG.info(
            "trial %s  step %d  %s %.2f",
            trial.trial_id, result["step"], self.metric, result[self.metric],
        )  # fmt: skip

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        LOG.info("trial %s  failed", trial.trial_id)


def _collect(space: Space, base: Config, grid: tune.ResultGrid) -> Search:
    trials = []
    for result in grid:
        metrics = result.metrics or {}
        step = int(metrics.get("step", 0))
        error = None if result.error is None else str(result.error).strip().splitlines()[-1]
        trials.append(
            Trial(
                name=str(metrics.get("trial_id", Path(result.path).name)),
                values=dict(result.config or {}),
                value=metrics.get(space.metric),
                step=step,
                stopped_early=error is None and step < base.training.steps,
                error=error,
            )
        )
    return Search(space.metric, trials, best_of(trials, space.metric))


def best_of(trials: list[Trial], metric: str) -> Trial:
    """The trial to take; raises KarmaRayError when none ended with a number."""
    done = [trial for trial in trials if trial.error is None and number(trial.value) is not None]
    if not done:
        reason = trials[0].error or f"{metric} of {trials[0].value}"
        raise KarmaRayError(f"every trial failed; the first one with: {reason}")
    return max(done, key=_rank)


def _rank(trial: Trial) -> tuple[bool, bool, float]:
    """Sort key: failed trials last, completed ones before stopped ones, then by the metric."""
    value = number(trial.value)  # comparisons with NaN are always false
    return trial.error is None, not trial.stopped_early, -math.inf if value is None else value


def _write(result: Search, space: Space, base: Config, out: str) -> None:
    write_json(to_dict(base), join(out, "config.json"))
    write_json(
        {
            "metric": result.metric,
            "best": result.best.name,
            "flags": result.flags(),
            "trials": [vars(trial) for trial in result.trials],
        },
        join(out, "trials.json"),
    )
    # The trials are whole runs with their own manifests; the search consists of its table.
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": "search",
        "content_hash": content_hash(join(out, "trials.json")),
        "parents": {},
        "space": space.path,
        "metric": result.metric,
    }
    write_json(manifest, join(out, "manifest.json"))


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _local(out: str) -> str:
    """Return the folder of Ray Tune's state: the output folder, or Ray's default if remote."""
    return str(Path.home() / "ray_results") if "://" in out else out

"""A search over configuration fields with Ray Tune: Optuna proposes values, ASHA stops trials.

Each trial is a whole run in its own worker process (`training.num_workers=0`) that reports every
validation. Trials are compared by a metric of the validation examples; the test examples have no
influence. What is known of each trial is kept by `studies/ledger.py`, not by Ray: an interrupted
search tells Optuna and ASHA what it has found, and goes on with unfinished runs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray import tune

from karma_ray.artifacts import absolute, open_filesystem
from karma_ray.cluster.accelerators import GPU, gpu_share
from karma_ray.cluster.elsewhere import run_elsewhere
from karma_ray.cluster.proposals import Settings, stopping_rule
from karma_ray.cluster.search_space import Space, check_trained
from karma_ray.cluster.session import connect
from karma_ray.cluster.supply import supply
from karma_ray.cluster.trials import Recorder, Train, reported_value, trainable
from karma_ray.cluster.waiting import need_of, telling
from karma_ray.config import Config, override
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.model.device import using_gpus
from karma_ray.runs.sources import cache_beside, toy_shop
from karma_ray.studies.ledger import (
    Ledger,
    Search,
    Trial,
    best_of,
    facts_of,
)
from karma_ray.studies.measured import measure
from karma_ray.studies.plan import Data
from karma_ray.studies.search_page import write_search_page
from karma_ray.studies.tracking import send_search

LOG = logging.getLogger(__name__)
RETRIES = 2
"""How often a failed trial is tried again, from its newest checkpoint."""


def search(
    space: Space,
    base: Config,
    *,
    data: str | None,
    trials: int,
    out: str,
    max_concurrent: int = 2,
    gpus_per_trial: float | None = None,
    measure_seeds: int = 3,
    train: Train | None = None,
    cache: str | None = None,
) -> Search:
    """Run trials of `base` with values drawn from `space`, until `trials` have ended in `out`.

    `base` already contains the space's fixed fields. Trials that an earlier call has left in `out`
    count. By default trials share the cluster's GPUs. The best trial is then measured on test
    beside `base`, with `measure_seeds` seeds. `train` replaces the whole run by a smaller
    objective, of which nothing is measured. `cache` is shared by the trials (default: as for a run
    in `out`). Raises InputError on wrong input, also if `out` holds another search, and
    KarmaRayError when it was interrupted or every trial failed.
    """
    _check(base, trials, max_concurrent, gpus_per_trial, measure_seeds)
    asked, base, out, tables = base, _in_process(base), absolute(out), None
    cache = absolute(cache or cache_beside(out))
    if train is None:
        tables = Data.open(data or toy_shop(cache))
        data = tables.uri
    data_hash = tables.hash if tables else None
    facts = {**facts_of(base, space.metric, space.distributions(), data_hash), "trials": trials}
    Ledger.check(out, facts)
    connect()
    gpus, shared = _gpus_of(base, gpus_per_trial, max_concurrent), base
    known = Ledger(out).trials()
    left = trials - sum(trial.ended != "unfinished" for trial in known)
    if train is None:
        from karma_ray.runs.pipeline import train_run
        from karma_ray.runs.plain_checkpoints import with_shared_checkpoints

        assert tables is not None
        shared = with_shared_checkpoints(base, cache)
        if left > 0:
            _prepare(space, shared, tables.uri, cache, gpus)
        train = partial(train_run, cache=cache, is_tested=False)
    ledger = Ledger.open(out, facts)
    if left > 0:
        _run(space, shared, data, ledger, known, left, max_concurrent, gpus, train)
    # Where a trial trained is no part of what it found: best.json says how the caller would train.
    result = _finished(space, asked, ledger, trials)
    if tables and measure_seeds:
        from karma_ray.cluster.study import RayMachine

        found = measure(
            result, shared, tables, RayMachine(), out=out, seeds=measure_seeds, cache=cache,
            concurrent=max_concurrent,
        )  # fmt: skip
        result = replace(result, measured=found)
        write_search_page(result, space.path, out)
    send_search(result, space.path, out)
    return result


def _finished(space: Space, base: Config, ledger: Ledger, trials: int) -> Search:
    """Write what a search ends with; raises KarmaRayError when fewer trials have ended."""
    ended = [trial for trial in ledger.trials() if trial.ended != "unfinished"]
    if len(ended) < trials:
        raise KarmaRayError(
            f"interrupted with {len(ended)} of {trials} trials; the same command with --out "
            f"{ledger.out} goes on"
        )
    best = best_of(ended, space.metric)
    result = Search(space.metric, base, tuple(ended), best, space.distributions())
    ledger.finish(result, space.path)
    write_search_page(result, space.path, ledger.out)
    return result


def _check(
    base: Config, trials: int, max_concurrent: int, gpus_per_trial: float | None,
    measure_seeds: int,
) -> None:  # fmt: skip
    if measure_seeds < 0:
        raise InputError("--measure-seeds", measure_seeds, "must be at least 0")
    for flag, count in (("--trials", trials), ("--concurrent", max_concurrent)):
        if count < 1:
            raise InputError(flag, count, "must be at least 1")
    if gpus_per_trial is not None and not 0 <= gpus_per_trial <= 1:
        raise InputError("--gpus-per-trial", gpus_per_trial, "must be from 0 to 1")
    check_trained("--set recipe", base.recipe)


def _in_process(base: Config) -> Config:
    """Let trials train in their own process and validate often enough to be stopped early."""
    changes = ["training.num_workers=0", "training.threads_per_worker=1"]
    if base.training.validate_every < 1:
        changes.append(f"training.validate_every={max(1, base.training.steps // 5)}")
    return override(base, changes)


def _gpus_of(base: Config, asked: float | None, concurrent: int) -> float:
    """Return the share of a GPU for each trial: what was asked for, or else an equal one."""
    if asked is not None:
        return asked
    if base.training.use_gpu == "false":
        return 0.0
    return gpu_share(supply().reach(GPU).possible, concurrent)


def _prepare(space: Space, base: Config, data: str, cache: str, gpus: float) -> None:
    """Make data, pretraining and warm-up once, in the cache, before trials compete for them.

    They are made where a trial will train. Raises InputError on a metric that is never reported.
    """
    from karma_ray.cluster.sharding import ensure_prepared

    ensure_prepared(data, base.prepare)
    stages = partial(_make_first_stages, space.metric, base, data, cache)
    run_elsewhere("first stages", stages, base.training.num_threads(), gpus)


def _make_first_stages(metric: str, base: Config, data: str, cache: str) -> None:
    from karma_ray.runs.assessment import validation_metrics
    from karma_ray.runs.first_stages import start_stage
    from karma_ray.runs.preparation import ensure_prepared

    with using_gpus(base.training.use_gpu != "false"):
        source = ensure_prepared(data, base.prepare)
        reported_value(metric, validation_metrics(base, source))
        start_stage(base, source, cache=cache)


def _run(
    space: Space, base: Config, data: str | None, ledger: Ledger, known: Sequence[Trial],
    left: int, max_concurrent: int, gpus: float, train: Train,
) -> None:  # fmt: skip
    if known:
        ended = sum(trial.ended != "unfinished" for trial in known)
        LOG.info("%d of %d trials have ended already", ended, ended + left)
    # None of Ray's loggers is used: the ledger holds what trials report.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # which prints boxes also if told to be silent
    logging.getLogger("optuna").setLevel(logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it misses the files of those loggers

    def on_end(trials: Sequence[Trial]) -> None:
        ended = [trial for trial in trials if trial.ended != "unfinished"]
        try:
            best = best_of(ended, space.metric)
        except KarmaRayError:  # all have failed so far
            return
        try:
            so_far = Search(space.metric, base, tuple(trials), best, space.distributions())
            write_search_page(so_far, space.path, ledger.out)
        except Exception as error:  # the page of a search that goes on must not end it
            LOG.warning("there is no page of the search yet: %s", error)

    fs, path = open_filesystem(ledger.out)
    remote = {"storage_filesystem": PyFileSystem(FSSpecHandler(fs))} if "://" in ledger.out else {}
    cpus = base.training.num_threads()
    tuner = tune.Tuner(
        tune.with_resources(
            trainable(space.metric, base, data, ledger, train),
            {"cpu": cpus, "gpu": gpus},
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
            callbacks=[Recorder(ledger, space.metric, base.training.steps, on_end)],
            **remote,
        ),
    )
    with telling("trials", need_of(cpus, gpus), min(left, max_concurrent)):
        tuner.fit()

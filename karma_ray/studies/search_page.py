"""The page of a search, `OUT/report.html`: what was found, what mattered, and what it cost.

It is written after every trial that ends, so a search can be watched, and for the last time when
the best trial has been measured.
"""

from __future__ import annotations

import shlex
import warnings
from collections import Counter

import optuna
from optuna.distributions import json_to_distribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from karma_ray.artifacts import join, write_bytes
from karma_ray.config import flattened, to_dict
from karma_ray.report.record import number
from karma_ray.studies.ledger import Measured, Search, ranked, shown
from karma_ray.studies.measured import read_measured
from karma_ray.studies.search_plots import (
    FRONT,
    coordinates_picture,
    curves_picture,
    front,
    front_picture,
    importance_picture,
)
from karma_ray.studies.sections import Section, html_page, plain
from karma_ray.training.checkpoints.outage import retried

PAGE = "report.html"
FEWEST = 4
"""Trials with a value from which importance is estimated."""


def write_search_page(search: Search, space: str, out: str) -> None:
    """Write the page of the search in `out`; `space` is the file that it searches."""
    shares = importances(search)
    drawn = {
        "importance": importance_picture(shares),
        "coordinates": coordinates_picture(search),
        "curves": curves_picture(search),
        "front": front_picture(search),
    }
    pictures = {name: png for name, png in drawn.items() if png is not None}
    sections = [
        _best(search, out),
        _measured(read_measured(out, search.best.name)),
        _importance(search, shares),
        Section("All settings", 2, (_STOPPED,), picture="coordinates"),
        Section("Learning curves", 2, picture="curves"),
        _front(search),
        _savings(search),
        _trials(search),
    ]
    told = [
        section
        for section in sections
        if section.picture in ("", *pictures) and (section.notes or section.rows or section.picture)
    ]
    command = f"python jobs/tune.py {shlex.quote(space)} --out {shlex.quote(out)}"
    page = html_page(f"Search of {search.metric}", told, pictures, command).encode()
    retried(lambda: write_bytes(page, join(out, PAGE)))


def importances(search: Search) -> dict[str, float]:
    """Return each drawn field's share of the variance between settings, by Optuna's fANOVA.

    The paper is Hutter et al. 2014, "An efficient approach for assessing hyperparameter
    importance". Stopped trials count with their last value, as they do for the proposals. Nothing
    is returned for too few trials, and where all have the same value.
    """
    values = [(t, v) for t in search.trials if (v := number(t.value(search.metric))) is not None]
    if len(values) < FEWEST or len({value for _, value in values}) == 1:
        return {}
    drawn = {name: json_to_distribution(text) for name, text in search.distributions.items()}
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    optuna.logging.set_verbosity(before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental, in some versions
        for trial, value in values:
            made = optuna.trial.create_trial(
                params=dict(trial.values), distributions=drawn, value=value
            )
            study.add_trial(made)
        evaluator = FanovaImportanceEvaluator(seed=0)
        try:
            return dict(get_param_importances(study, evaluator=evaluator))
        except RuntimeError:  # no tree of its forest has found a difference
            return {}


_STOPPED = "Trials that were stopped early are shown with their last value."


def _best(search: Search, out: str) -> Section:
    ends, count = Counter(trial.ended for trial in search.trials), len(search.trials)
    best, before = search.best, dict(flattened(to_dict(search.base)))
    value = plain(number(best.value(search.metric)), 2)
    train = f"python jobs/train.py --config {shlex.quote(join(out, 'best.json'))}"
    notes = (
        f"{count} trial{'s' * (count != 1)}: {', '.join(f'{n} {end}' for end, n in ends.items())}.",
        f"Trial {best.name} is the best one, with {search.metric} {value} at step {best.step}.",
        f"When the search has ended, train it with: {train}",
    )
    rows = [(field, shown(v), shown(before.get(field))) for field, v in best.values.items()]
    header = ("field", "best", "default")
    return Section("The best settings", 2, notes, header, tuple(rows))


def _measured(found: Measured | None) -> Section:
    if found is None:
        return Section("Beside the default, on test", 2)
    if not found.compared:
        return Section("Beside the default, on test", 2, ("The data have no test examples.",))
    header, *rows = map(tuple, found.rows())
    note = (
        f"Trained anew with {len(found.seeds)} seeds that the search has not used "
        f"({', '.join(map(str, found.seeds))}). Percent and points; * if the 95 % interval over "
        "other users and other seeds excludes 0, (*) with one seed, over other users alone. "
        f"Intervals are not widened for being {len(found.compared)}."
    )
    return Section("Beside the default, on test", 2, (note,), header, tuple(rows))


def _importance(search: Search, shares: dict[str, float]) -> Section:
    if not shares:
        note = f"Importance is estimated from {FEWEST} trials with different values on."
        return Section("Importance of the fields", 2, (note,))
    note = (
        "fANOVA over trials that were drawn, most of them by a sampler that follows the best ones: "
        f"a hint with {len(search.trials)} trials, not a measurement. {_STOPPED}"
    )
    return Section("Importance of the fields", 2, (note,), picture="importance")


def _front(search: Search) -> Section:
    best = front(search)
    names = ", ".join(trial.name for trial in best) or "none yet"
    told = f"Whole trials that no other one beats in both, on validation: {names}."
    return Section(f"{FRONT[0]} against {FRONT[1]}", 2, (told,), picture="front")


def _savings(search: Search) -> Section:
    steps = search.base.training.steps
    ran = sum(trial.step for trial in search.trials)
    stopped = Counter(t.step for t in search.trials if t.ended == "stopped early")
    note = (
        f"{ran:,} steps were run. Stopping weak trials saved {100 * search.saved_share():.0f} % of "
        f"the {steps:,} steps that every trial would have taken; failed ones are not counted."
    )
    rows = tuple((f"{step:,}", str(count)) for step, count in sorted(stopped.items()))
    return Section("What early stopping saved", 2, (note,), ("stopped after step", "trials"), rows)


def _trials(search: Search) -> Section:
    fields = list(search.distributions)
    others = [name for name in FRONT if f"valid/{name}" != search.metric]
    rows = [
        (
            trial.name, *(shown(trial.values.get(field)) for field in fields),
            plain(number(trial.value(search.metric)), 2),
            *(plain(trial.value(name), 2) for name in others),
            str(trial.step), trial.ended, str(trial.failures), trial.error or "–",
        )
        for trial in ranked(search)
    ]  # fmt: skip
    header = ("trial", *fields, search.metric, *others, "step", "ended", "failures", "last error")
    return Section("Trials", 2, header=header, rows=tuple(rows))

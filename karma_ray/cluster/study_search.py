"""The same search for every trained row of a study: N settings each, chosen on validation.

Every candidate is an ordinary run of the first seed with a record of its own, so a search that
was stopped goes on, and the chosen run is the first seed's run. Selection sees the last
validated step of each; the test metrics of the records play no part in it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from karma_ray import recipes
from karma_ray.cluster.search_space import Space, assignments
from karma_ray.cluster.study_plan import Data, planned
from karma_ray.cluster.trial import Trial
from karma_ray.config import override
from karma_ray.errors import InputError
from karma_ray.report.results import METRIC, read_records, same_run, validated
from karma_ray.report.rows import Row

LOG = logging.getLogger(__name__)
SPACE = str(Path(__file__).resolve().parents[2] / "tune_spaces" / "baselines.py")
"""What is drawn from."""
Settings = tuple[str, ...]


def candidates(space: Space, number: int) -> list[Settings]:
    """`number` settings, the same at every call: the study's own first, the others drawn.

    A longer list begins with the shorter one. Raises InputError on a number below 2.
    """
    if number < 2:
        raise InputError("--search", number, "must be at least 2: the study's own settings and one")
    draws = np.random.RandomState(0)
    drawn: list[Settings] = [()]
    for _ in range(number - 1):
        values = {path: domain.sample(random_state=draws) for path, domain in space.domains.items()}
        rounded = {p: float(f"{v:.3g}") if isinstance(v, float) else v for p, v in values.items()}
        drawn.append(tuple(assignments(rounded)))
    return drawn


def with_settings(trial: Trial, settings: Settings) -> Trial:
    """The trial with settings that a search gives its row alone."""
    config = override(trial.config, settings)
    config.training.check()
    return replace(trial, config=config, searched=settings)


def search_trials(
    rows: Sequence[Row], seed: int, data: Data, extra: Sequence[str], found: Sequence[Settings]
) -> list[Trial]:
    """Every trained row with every candidate, candidate by candidate."""
    trained = [row for row in rows if row.built_from in recipes.TRAINED]
    trials = planned(trained, [seed], data, extra)
    return [with_settings(trial, settings) for settings in found for trial in trials]


def chosen_trials(
    rows: Sequence[Row], seeds: Sequence[int], data: Data, extra: Sequence[str],
    found: Sequence[Settings], results: Path,
) -> list[Trial]:  # fmt: skip
    """Every row x seed, trained rows with their best candidate; rows without a validated
    candidate are left out."""
    records = read_records(results)
    best: dict[str, Settings] = {}
    for row in rows:
        values: dict[Settings, float] = {}
        if row.built_from not in recipes.TRAINED:
            best[row.name] = ()
            continue
        for trial in search_trials([row], seeds[0], data, extra, found):
            of_trial = (r for r in records if same_run(r, trial.config, data.hash))
            value = next((v for r in of_trial if (v := validated(r)) is not None), None)
            if value is not None:
                values[trial.searched] = value
        if values:
            best[row.name] = max(values, key=values.__getitem__)
            told = " ".join(best[row.name]) or "the study's own settings"
            LOG.info(
                "%s: %s of %d settings (validation %s %.1f)",
                row.name, told, len(values), METRIC, values[best[row.name]],
            )  # fmt: skip
    kept = [row for row in rows if row.name in best]
    return [with_settings(t, best[t.row]) for t in planned(kept, seeds, data, extra)]

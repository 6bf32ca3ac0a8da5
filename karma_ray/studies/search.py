"""The search for settings of a study: N settings for every trained row, chosen on validation.

Every candidate is an ordinary run of the first seed with a record, so an interrupted search can be
continued, and the chosen run is the first seed's run. The choice uses the last validation of each;
the test metrics in the records have no influence.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from karma_ray import recipes
from karma_ray.config import Config, override
from karma_ray.data.prepared import read_data_manifest
from karma_ray.errors import InputError
from karma_ray.studies.plan import Data, planned
from karma_ray.studies.records import METRIC, read_records, same_run, validated
from karma_ray.studies.rows import Row
from karma_ray.studies.trial import Trial

LOG = logging.getLogger(__name__)
RATE, WEIGHT, TEXTS = "training.learning_rate", "objective.hard_weight", "objective.lambda_dec"
MOST = 9
"""Largest number of settings per row."""
Settings = tuple[str, ...]
Factors = dict[str, float]
"""Factors on the study's own values, by field."""


def candidates(config: Config, number: int, *, has_negatives: bool = True) -> list[Settings]:
    """Return the first `number` settings around a configuration, all different; () is its own.

    The learning rate comes first, then the weight of the texts if the row has any, and that of
    hard negatives (without effect under InfoNCE, and on data without negatives) or further rates.
    Raises InputError unless 2 <= number <= MOST.
    """
    if not 2 <= number <= MOST:
        raise InputError("--search", number, f"must be 2 to {MOST} settings per row")
    objective = config.objective
    found: list[Factors] = [{}, {RATE: 1 / 3}, {RATE: 3}]
    if objective.built.text:
        found += [{TEXTS: 1 / 3}, {TEXTS: 1 / 10}]
    if has_negatives and objective.action_loss != "infonce":
        found += [{WEIGHT: 1 / 3}, {WEIGHT: 3}]
        found += [{RATE: 1 / 3, WEIGHT: 1 / 3}, {RATE: 3, WEIGHT: 3}]
        found += [{RATE: 1 / 3, WEIGHT: 3}, {RATE: 3, WEIGHT: 1 / 3}]
    else:
        found += [{RATE: factor} for factor in (1 / 2, 2, 1 / 6, 6, 1 / 10, 10)]
    own = {
        RATE: config.training.learning_rate, WEIGHT: objective.hard_weight,
        TEXTS: objective.lambda_dec,
    }  # fmt: skip
    return [
        tuple(f"{path}={float(f'{own[path] * factor:.3g}')}" for path, factor in factors.items())
        for factors in found[:number]
    ]


def with_settings(trial: Trial, settings: Settings) -> Trial:
    """Return the trial with settings that a search gives only to its row."""
    return replace(trial, config=override(trial.config, settings), searched=settings)


def search_trials(
    rows: Sequence[Row], seed: int, data: Data, extra: Sequence[str], number: int
) -> list[Trial]:
    """Return every trained row with each of its `number` candidates, candidate by candidate."""
    trained = [row for row in rows if row.built_from in recipes.TRAINED]
    has_negatives = read_data_manifest(data.uri).get("negative_source") != "none"
    found = [
        [
            with_settings(trial, settings)
            for settings in candidates(trial.config, number, has_negatives=has_negatives)
        ]
        for trial in planned(trained, [seed], data, extra)
    ]
    return [trial for of_place in zip(*found, strict=True) for trial in of_place]


def chosen_trials(
    rows: Sequence[Row], seeds: Sequence[int], data: Data, extra: Sequence[str], number: int,
    results: Path,
) -> list[Trial]:  # fmt: skip
    """Return every row and seed, trained rows with their best candidate; rows without a
    validated candidate are left out."""
    records = read_records(results)
    best: dict[str, Settings] = {}
    for row in rows:
        if row.built_from not in recipes.TRAINED:
            best[row.name] = ()
            continue
        values: dict[Settings, float] = {}
        for trial in search_trials([row], seeds[0], data, extra, number):
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

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

from karma_ray import recipes
from karma_ray.cluster.study_plan import Data, planned
from karma_ray.cluster.trial import Trial
from karma_ray.config import Config, override
from karma_ray.data.prepared import read_data_manifest
from karma_ray.errors import InputError
from karma_ray.report.results import METRIC, read_records, same_run, validated
from karma_ray.report.rows import Row

LOG = logging.getLogger(__name__)
FACTORS = (
    (1, 1), (1 / 3, 1), (3, 1), (1, 1 / 3), (1, 3), (1 / 3, 1 / 3), (3, 3), (1 / 3, 3), (3, 1 / 3),
)  # fmt: skip
"""What the study's own learning rate and weight of hard negatives are multiplied by, in turn."""
RATES = (1, 1 / 3, 3, 1 / 2, 2, 1 / 6, 6, 1 / 10, 10)
"""The same where the weight changes nothing: under InfoNCE, and on data without negatives."""
Settings = tuple[str, ...]


def candidates(config: Config, number: int, *, has_negatives: bool = True) -> list[Settings]:
    """The first `number` settings around a configuration, all different; its own are ().

    Raises InputError on a number that is no search, or more than there are.
    """
    if not 2 <= number <= len(FACTORS):
        raise InputError("--search", number, f"must be 2 to {len(FACTORS)} settings a row")
    weighs = has_negatives and config.objective.action_loss != "infonce"
    around = {
        "training.learning_rate": config.training.learning_rate,
        "objective.hard_weight": config.objective.hard_weight,
    }
    return [
        tuple(
            f"{path}={float(f'{value * factor:.3g}')}"
            for (path, value), factor in zip(around.items(), factors, strict=True)
            if factor != 1
        )
        for factors in (FACTORS if weighs else [(rate, 1) for rate in RATES])[:number]
    ]


def with_settings(trial: Trial, settings: Settings) -> Trial:
    """The trial with settings that a search gives its row alone."""
    config = override(trial.config, settings)
    config.training.check()
    return replace(trial, config=config, searched=settings)


def search_trials(
    rows: Sequence[Row], seed: int, data: Data, extra: Sequence[str], number: int
) -> list[Trial]:
    """Every trained row with each of its `number` candidates, candidate by candidate."""
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
    """Every row x seed, trained rows with their best candidate; rows without a validated
    candidate are left out."""
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

"""What Ray Tune decides in a search: the next setting (Optuna), and which trials stop early (ASHA).

Both are told what an interrupted search has found, because Ray keeps no state of ASHA and writes
that of Optuna only now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from optuna.distributions import json_to_distribution
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from karma_ray.cluster.search_space import Space
from karma_ray.config import Config
from karma_ray.report.record import number
from karma_ray.studies.ledger import Trial


class Settings(OptunaSearch):
    """Names every setting: first the unfinished ones of an interrupted search, then new ones."""

    def __init__(self, space: Space, seed: int, known: Sequence[Trial]) -> None:
        unfinished = [trial for trial in known if trial.ended == "unfinished"]
        distributions = {n: json_to_distribution(d) for n, d in space.distributions().items()}
        super().__init__(
            distributions,
            metric=space.metric,
            mode="max",
            points_to_evaluate=[dict(trial.values) for trial in unfinished],
            # The same seed would propose the first settings again.
            seed=seed + len(known),
        )
        self._names = [trial.name for trial in unfinished]
        self._next = len(known)
        for trial in known:
            if trial.ended != "unfinished":
                value = number(trial.value(space.metric))
                failed = trial.ended == "failed" or value is None
                self.add_evaluated_point(dict(trial.values), value or 0.0, error=failed)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the name and the values of the next trial."""
        values = super().suggest(trial_id)
        if self._names:
            return {"name": self._names.pop(0), "values": values}
        self._next += 1
        return {"name": f"{self._next - 1:03d}", "values": values}


def stopping_rule(base: Config, metric: str, known: Sequence[Trial]) -> ASHAScheduler:
    """Return ASHA, which knows the validations of the trials so far."""
    # max_t is after the last step, so that a trial which gets there ends by itself with its bundle.
    scheduler = ASHAScheduler(
        time_attr="step",
        metric=metric,
        mode="max",
        max_t=base.training.steps + 1,
        grace_period=min(base.training.validate_every, base.training.steps),
        reduction_factor=2,
    )
    for trial in known:  # what later trials are compared with
        stand_in: Any = SimpleNamespace(trial_id=f"known-{trial.name}")
        scheduler.on_trial_add(None, stand_in)
        for point in trial.curve:
            scheduler.on_trial_result(None, stand_in, dict(point))
    return scheduler

"""A search with known numbers, as its files say it: six trials of two fields."""

from __future__ import annotations

from typing import Any

from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    distribution_to_json,
)

from karma_ray.config import Config, override
from karma_ray.studies.ledger import Search, Trial

METRIC = "valid/HR@50"
DRAWN = {
    "training.learning_rate": distribution_to_json(FloatDistribution(1e-4, 1e-2, log=True)),
    "objective.action_loss": distribution_to_json(CategoricalDistribution(["bce", "infonce"])),
}
LOSSES = ("bce", "infonce")
"""Of trials with even and odd names."""


def curve(*values: float) -> tuple[dict[str, float], ...]:
    """A validation every 10 steps; HR@200 is twice the metric, JS@50 falls as it rises."""
    return tuple(
        {"step": 10 * place, METRIC: v, "HR@50": v, "HR@200": 2 * v, "JS@50": 30 - v}
        for place, v in enumerate(values, 1)
    )


def made(number: int, *values: float, **changes: Any) -> Trial:
    """Trial `number`, which ran to its end unless it says otherwise."""
    drawn = {
        "training.learning_rate": 1e-4 * 2**number,
        "objective.action_loss": LOSSES[number % 2],
    }
    return Trial(
        f"{number:03d}", drawn, curve(*values), **({"ended": "ran to its end"} | changes)
    )  # fmt: skip


def search() -> Search:
    """Of 40 steps each; trial 003 is the best."""
    best = made(3, 5.0, 9.0, 12.0, 14.0)
    trials = (
        made(0, 2.0, 4.0, 5.0, 6.0), made(1, 1.0, ended="stopped early"),
        made(2, 2.0, 3.0, ended="stopped early"), best,
        made(4, ended="failed", failures=3, error="<no memory>"),
        Trial("005", made(0).values),
    )  # fmt: skip
    base = override(Config(), ["training.steps=40", "training.validate_every=10"])
    return Search(METRIC, base, trials, best, DRAWN)

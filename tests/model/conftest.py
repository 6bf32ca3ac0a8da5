"""Models of every layout, as initialised and after a few joint steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from karma_ray.model.karma import KarmaModel
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.step import JointStep
from tests import tiny

Build = Callable[[str, str], KarmaModel]


@cache
def _trained(layout: str, query_mode: str) -> KarmaModel:
    karma, batch, step = tiny.model(layout, query_mode), tiny.batch(), JointStep(ObjectiveConfig())
    tiny.train(karma, lambda: step(karma, batch).loss, steps=5, learning_rate=1e-2)
    return karma


@pytest.fixture(params=["fresh", "trained"])
def build(request: pytest.FixtureRequest) -> Build:
    """layout, query_mode -> model."""
    return cache(tiny.model) if request.param == "fresh" else _trained

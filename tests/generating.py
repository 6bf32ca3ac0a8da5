"""A tiny whole model with a generator."""

from __future__ import annotations

from typing import Any

import torch

from karma_ray.model.config import GeneratorConfig
from karma_ray.model.interest import InterestModel
from karma_ray.model.karma import KarmaModel
from tests import tiny


def add_generator(interest: InterestModel, **fields: Any) -> InterestModel:
    """A generator whose network is past its zero start."""
    interest.generate_with(GeneratorConfig(**{"kind": "fm", **fields}), seed=3)
    assert interest.generator is not None
    stream = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in interest.generator.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=stream))
    return interest


def model(**fields: Any) -> KarmaModel:
    """`tiny.model()` and a generator (flow matching unless told otherwise)."""
    whole = tiny.model()
    add_generator(whole.interest, **fields)
    return whole

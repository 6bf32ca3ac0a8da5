"""A small model of which only the top layers of the item encoder are trained, and its states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from karma_ray.model.backbone import build_tiny
from karma_ray.model.config import (
    DecodabilityConfig,
    ItemEncoderConfig,
    ModelConfig,
    UserDecoderConfig,
)
from karma_ray.model.frozen_states import FrozenStates, write_states
from karma_ray.model.interest import InterestModel
from karma_ray.model.karma import KarmaModel
from karma_ray.model.lora import adapt
from karma_ray.runs.frozen_outputs import FrozenPortions
from tests import tiny

DEEP = replace(tiny.BODY, num_layers=3)


def model(train_layers: int = 1, rank: int | None = None, **encoder: Any) -> KarmaModel:
    """A model whose item encoder has three layers, with queries that pass through it too."""
    config = ModelConfig(
        tiny=DEEP,
        item_encoder=ItemEncoderConfig(train_layers=train_layers, **encoder),
        user_decoder=UserDecoderConfig(query_mode="encoder"),
        decodability=DecodabilityConfig(max_target_tokens=8),
    )
    size = len(tiny.tokenizer().get_vocab())  # type: ignore[attr-defined]
    bodies = [build_tiny(DEEP, size, seed) for seed in (1, 2)]
    if rank is not None:
        adapt(bodies[0], rank, 0, 3 - train_layers)
        adapt(bodies[1], rank, 1)
    interest = InterestModel(config, *bodies, tiny.tokenizer())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in interest.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return KarmaModel(interest, tiny.tokenizer())


def states(karma: KarmaModel, path: Path, precision: str = "float32") -> FrozenStates:
    """The file of the catalogue's states, and its reader."""
    encoder = karma.interest.item_encoder
    portions = FrozenPortions(encoder, *tiny.item_tokens(), precision)
    counts = portions.lengths + len(encoder.instruction)
    write_states(str(path), counts, DEEP.hidden_size, precision, portions.encoded)
    return FrozenStates.open(str(path), counts)

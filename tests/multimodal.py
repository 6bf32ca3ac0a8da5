"""A tiny item encoder that reads text and picture, and pictures for the tiny catalogue."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from karma_ray.data.pixels import PixelTable
from karma_ray.model.backbone import build_tiny, build_tiny_with_pictures
from karma_ray.model.config import ItemEncoderConfig
from karma_ray.model.interest import InterestModel
from karma_ray.model.karma import KarmaModel
from tests import tiny

SIDE = 64
BLIND = (0, 5, 48)
"""Rows of items without a picture."""


def pictures(seed: int = 0) -> PixelTable:
    """Random colours; none for BLIND."""
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 256, (tiny.catalog().num_items, 1 + SIDE * SIDE * 3))
    values[:, 0] = 1
    values[list(BLIND)] = 0
    return PixelTable(values.astype(np.uint8))


def model(seed: int = 0, **encoder: Any) -> KarmaModel:
    """`tiny.model` with a vision tower; the text weights are those of `tiny.model(seed=seed)`."""
    text = tiny.model(seed=seed, decodes=False)
    config = text.interest.config
    settings = {"modality": "multimodal", "image_size": SIDE, **encoder}
    config = replace(config, item_encoder=ItemEncoderConfig(**settings))
    words = tiny.tokenizer()
    size = len(words.get_vocab())  # type: ignore[attr-defined]
    body = build_tiny_with_pictures(build_tiny(tiny.BODY, size, 10 * seed + 1), 1, 2, seed)
    user = build_tiny(tiny.BODY, size, 10 * seed + 2)
    interest = InterestModel(config, body, user, words, seed)
    interest.load_state_dict(text.interest.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in body.visual.parameters():  # type: ignore[union-attr]
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    interest.item_encoder.pictures = pictures()
    return KarmaModel(interest, words, decodes=False)

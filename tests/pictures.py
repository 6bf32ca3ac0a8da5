"""Tiny visual features of the tiny catalogue, batches that hold them, and models that read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from karma_ray.data.batch import Batch
from karma_ray.data.collate import Collator
from karma_ray.data.draws import row_keys
from karma_ray.data.visual import VisualFeatures
from karma_ray.model.backbone import token_embeddings
from karma_ray.model.config import ImageryConfig
from karma_ray.model.imagery import Imagery, ImageShape
from karma_ray.model.karma import KarmaModel
from tests import tiny

SHAPE = ImageShape(num_tokens=3, width=6)
MISSING = (1, 5, 14, 20)
"""Items without an image."""


def features() -> VisualFeatures:
    """Of each item of the tiny catalogue but a few."""
    shape = (tiny.catalog().num_items, SHAPE.num_tokens, SHAPE.width)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    values[list(MISSING)] = np.nan
    return VisualFeatures(values, {})


def batch(rows: pa.Table | None = None, seed: int = 0, first: int = 0, **changes: Any) -> Batch:
    """`tiny.batch` with images; the rows draw as if `first` others stood before them."""
    plain, rows = tiny.collator(**changes), tiny.shop() if rows is None else rows
    collator = Collator(
        plain.catalog, plain.tokenizer, plain.config, *plain.catalog_tokens(), features()
    )
    return collator.training(rows, row_keys(first + rows.num_rows, seed)[first:])


def model(
    layout: str = "interleaved", query_mode: str = "embed_pool", *, decodes: bool = True,
    imagery: dict[str, Any] | None = None, **decodability: Any,
) -> KarmaModel:  # fmt: skip
    """`tiny.model` with image queries and a head that already says something."""
    bare = tiny.model(layout, query_mode, decodes=False, **decodability)
    rows = token_embeddings(bare.interest.user_decoder.body)
    part = Imagery(ImageryConfig(**(imagery or {})), SHAPE, rows, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in part.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return KarmaModel(bare.interest, bare.tokenizer, decodes=decodes, imagery=part)

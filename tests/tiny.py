"""Tiny real things: a catalogue of 48 items, a tokenizer, windows, and a 27k-parameter Qwen3.

Nothing here is a mock: the models are Qwen3 bodies of 32 dimensions and two layers.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from karma_ray.data.catalog import Catalog
from karma_ray.data.collate import Batch, CollateConfig, Collator
from karma_ray.data.draws import row_keys
from karma_ray.data.prompts import Tokenizer, encode_texts
from karma_ray.data.schema import EXAMPLES, ITEMS, SEQUENCES
from karma_ray.model.backbone import build_tiny
from karma_ray.model.backbones.tokenizer import train_tokenizer
from karma_ray.model.config import (
    DecodabilityConfig,
    ItemEncoderConfig,
    ModelConfig,
    ScoreConfig,
    TinyBackboneConfig,
    UserDecoderConfig,
)
from karma_ray.model.interest import InterestModel
from karma_ray.model.karma import KarmaModel

COLOURS = ("red", "blue", "green", "black", "white", "pink")
THINGS = ("shirt", "mug", "lamp", "chair", "kettle", "scarf", "boots", "vase")
QUERIES = ("warm scarf", "mug", "a red chair for the garden", "boots", "lamp")
BODY = TinyBackboneConfig(
    hidden_size=32, num_layers=2, num_heads=2, num_key_value_heads=1, intermediate_size=64
)
# Nothing random: full queries, every loss step decoded.
PLAIN = CollateConfig(max_item_tokens=10, max_query_tokens=6, drop_query=0.0, num_decoded=0)
MONDAY = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)

# Every layout with every query mode it takes.
VARIANTS = [
    ("interleaved", "embed_pool"), ("interleaved", "encoder"), ("interleaved", "none"),
    ("query_last", "embed_pool"), ("query_last", "tokens"), ("query_last", "encoder"),
    ("query_last", "none"), ("items_only", "embed_pool"), ("items_only", "none"),
]  # fmt: skip


@cache
def catalog() -> Catalog:
    """Items `i0`..`i47` of different text, then `copy`: the text of i0 in other capitals."""
    rows: list[dict[str, Any]] = [
        {"item_id": f"i{n}", "title": f"{COLOURS[n % 6]} {THINGS[n // 6]}", "brand": f"house {n}"}
        for n in range(48)
    ]
    rows[5]["text"] = "soft and warm in winter, dry in the rain"
    rows.append({"item_id": "copy", "title": "RED  Shirt", "brand": "House 0"})
    return Catalog(pa.Table.from_pylist(rows, schema=ITEMS).drop_columns(["image"]))


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE of the catalogue's text and the queries."""
    return train_tokenizer(iter([*catalog().texts(), *QUERIES]), 360)


@cache
def item_tokens(max_tokens: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [I, L] and lengths [I] of the catalogue."""
    return encode_texts(tokenizer(), catalog().texts(), max_tokens)


def collator(**changes: Any) -> Collator:
    """A collator of training windows and requests."""
    config = replace(PLAIN, **changes)
    return Collator(catalog(), tokenizer(), config, *item_tokens(config.max_item_tokens))


def window(
    ids: Sequence[str],
    hours: Sequence[int] | None = None,
    pages: Sequence[str] | None = None,
    *,
    queries: Sequence[str | None] | None = None,
    hard: Sequence[Sequence[str]] | None = None,
    loss: Sequence[bool] | None = None,
    user: str = "u",
) -> dict[str, Any]:
    """One `sequences` row; by default every click is a page of its own at an hour of its own."""
    count = len(ids)
    hours = list(range(count)) if hours is None else list(hours)
    return {
        "user_id": user,
        "item_ids": list(ids),
        "queries": [QUERIES[h % 5] for h in hours] if queries is None else list(queries),
        "timestamps": [MONDAY + dt.timedelta(hours=h) for h in hours],
        "page_ids": [f"{user}-{h}" for h in hours] if pages is None else list(pages),
        "hard_negative_ids": [[]] * count if hard is None else [list(row) for row in hard],
        "loss_mask": [True] * count if loss is None else list(loss),
    }


def sequences(*rows: dict[str, Any]) -> pa.Table:
    """Rows -> the `sequences` table."""
    return pa.Table.from_pylist(list(rows), schema=SEQUENCES)


def shop(num_windows: int = 5, seed: int = 0) -> pa.Table:
    """Random windows of 3 to 9 different items, two clicks a page, three hard negatives each."""
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(num_windows):
        count = int(generator.integers(3, 10))
        chosen = [f"i{n}" for n in generator.permutation(48)]
        hours = [step // 2 for step in range(count)]
        hard = [generator.choice(chosen[count:], 3, replace=False).tolist() for _ in range(count)]
        rows.append(window(chosen[:count], hours, hard=hard, user=f"u{user}"))
    return sequences(*rows)


def batch(rows: pa.Table | None = None, seed: int = 0, **changes: Any) -> Batch:
    """A training batch."""
    rows = shop() if rows is None else rows
    return collator(**changes).training(rows, row_keys(rows.num_rows, seed))


def request(
    history: Sequence[str],
    query: str | None,
    *,
    hours: Sequence[int] | None = None,
    queries: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """One `examples` row with what a request holds."""
    row = window(history, hours, queries=queries)
    return {
        "query": query,
        "history_item_ids": row["item_ids"],
        "history_queries": row["queries"],
        "history_timestamps": row["timestamps"],
    }


def examples(*rows: dict[str, Any]) -> pa.Table:
    """Requests -> the `examples` table."""
    return pa.Table.from_pylist(list(rows), schema=EXAMPLES)


def model(
    layout: str = "interleaved",
    query_mode: str = "embed_pool",
    *,
    pool: str = "eos",
    instruction: str = "",
    score: str = "rms_dot",
    lexical: int = 0,
    lm_head: Tensor | None = None,
    decodes: bool = True,
    seed: int = 0,
    **decodability: Any,
) -> KarmaModel:
    """A whole model whose parts all differ, so that a mix-up would show."""
    config = ModelConfig(
        tiny=BODY,
        item_encoder=ItemEncoderConfig(
            pool=pool,  # type: ignore[arg-type]
            instruction=instruction,
            lexical=lexical,
        ),
        user_decoder=UserDecoderConfig(
            layout=layout,
            query_mode=query_mode,
        ),
        score=ScoreConfig(kind=score),  # type: ignore[arg-type]
        decodability=DecodabilityConfig(**{"max_target_tokens": 8, **decodability}),
    )
    size = len(tokenizer().get_vocab())  # type: ignore[attr-defined]
    bodies = [build_tiny(BODY, size, 10 * seed + offset) for offset in (1, 2)]
    interest = InterestModel(config, *bodies, tokenizer(), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in interest.parameters():
            # wide enough that attention attends: at Hugging Face's 0.02 it is nearly uniform
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return KarmaModel(interest, tokenizer(), lm_head=lm_head, decodes=decodes)


def train(
    karma: KarmaModel, loss: Callable[[], Tensor], steps: int, learning_rate: float = 3e-3
) -> list[float]:
    """Plain AdamW on `loss()`; returns the losses."""
    trained = [value for value in karma.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    losses = []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    karma.zero_grad()
    return losses


def num_parameters(module: torch.nn.Module) -> int:
    """Numbers held in memory by a module's parameters, shared ones once."""
    return sum(value.numel() for value in module.parameters())


def gradients(karma: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss by parameter name; parameters it does not reach are absent."""
    karma.zero_grad(set_to_none=True)
    loss.backward()
    found = {n: p.grad for n, p in karma.named_parameters() if p.grad is not None}
    karma.zero_grad(set_to_none=True)
    return found

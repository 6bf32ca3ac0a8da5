"""A tiny real run folder: a Qwen3 of a few thousand weights and a catalogue of 40 items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from karma_ray.artifacts import RunFolder, join, write_manifest, write_table
from karma_ray.data.catalog import Catalog
from karma_ray.data.collate import CollateConfig, Collator
from karma_ray.data.prompts import Tokenizer, encode_texts
from karma_ray.data.schema import ITEMS
from karma_ray.model.backbone import build_tiny
from karma_ray.model.backbones.tokenizer import train_tokenizer
from karma_ray.model.config import ModelConfig, ScoreConfig, TinyBackboneConfig
from karma_ray.model.interest import InterestModel
from karma_ray.retrieval.encode import ItemTable, encode_catalog, save_embeddings
from karma_ray.retrieval.export import load_bundle, save_bundle
from karma_ray.retrieval.index_build import index_run
from karma_ray.studies.plan import HERE

COLOURS = ("red", "blue", "green", "black", "white")
THINGS = ("shirt", "mug", "lamp", "chair", "kettle", "scarf", "boots", "vase")
COLLATE = CollateConfig(max_history=5, max_item_tokens=8, max_query_tokens=6)
TINY = TinyBackboneConfig(
    hidden_size=32, num_layers=2, num_heads=2, num_key_value_heads=1, intermediate_size=64
)

SMALL_STUDY = (
    "model.tiny.hidden_size=32", "model.tiny.num_heads=2", "model.tiny.intermediate_size=64",
    "model.tiny.num_key_value_heads=1", "model.tiny.vocab_size=512", "pretrain.steps=4",
    "warmup.steps=4", "training.steps=6", "training.batch_size=8", "training.report_every=2",
    "training.validate_every=3", "evaluation.max_examples=40", *HERE,
)  # fmt: skip
"""Settings of trials that take a few seconds each, in their own process."""


def items_table() -> pa.Table:
    """40 items `i0`..`i39`: every colour of every thing, some with a longer text."""
    titles = [f"{colour} {thing}" for thing in THINGS for colour in COLOURS]
    rows = [
        {"item_id": f"i{n}", "title": title, "text": "soft and warm" if n % 3 == 0 else None}
        for n, title in enumerate(titles)
    ]
    return pa.Table.from_pylist(rows, schema=ITEMS)


def catalog() -> Catalog:
    """The catalogue in memory."""
    return Catalog(items_table().drop_columns(["image"]))


def tokenizer() -> Tokenizer:
    """A BPE of the catalogue's text."""
    return train_tokenizer(iter(catalog().texts()), 320)


def interest_model(words: Tokenizer, seed: int = 0, score: str = "rms_dot") -> InterestModel:
    """An untrained model whose parts differ, so that a mix-up would show."""
    size = len(words.get_vocab())  # type: ignore[attr-defined]
    bodies = [build_tiny(TINY, size, seed + offset) for offset in (1, 2)]
    config = ModelConfig(tiny=TINY, score=ScoreConfig(kind=score))  # type: ignore[arg-type]
    model = InterestModel(config, *bodies, words, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".body." not in name:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model


def item_tokens(words: Tokenizer, of: Catalog) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [I, L] and lengths [I] of a catalogue."""
    return encode_texts(words, of.texts(), COLLATE.max_item_tokens)


def collator(words: Tokenizer, of: Catalog) -> Collator:
    """A collator of requests."""
    return Collator(of, words, COLLATE)


def write_data(root: Path) -> str:
    """DATA/items; returns DATA."""
    data = str(root / "data")
    write_table(items_table(), join(data, "items"))
    return data


def write_run(root: Path, seed: int = 0, interest: InterestModel | None = None) -> str:
    """A finished run folder (bundle, item_embeddings, index) beside its data; returns RUN."""
    run = RunFolder(str(root / "run"))
    words = tokenizer()
    interest = interest or interest_model(words, seed)
    saved = save_bundle(interest, words, COLLATE, run.bundle, {"recipe": "tiny", "seed": seed})
    bundle = load_bundle(run.bundle)
    items = catalog()
    vectors = encode_catalog(bundle.interest, *item_tokens(words, items))
    parents = {"bundle": saved["content_hash"], "items": "none"}
    table = ItemTable(items.item_ids, items.titles, vectors, parents)
    save_embeddings(table, run.item_embeddings)
    index_run(run.root)
    write_manifest(run.root, "run", data=str(root / "data"))
    return run.root

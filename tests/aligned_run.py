"""A tiny finished run with co-clicks to align it with: users click things of one colour."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from karma_ray.artifacts import RunFolder, join, write_json, write_manifest, write_table
from karma_ray.data.catalog import Catalog
from karma_ray.data.collate import CollateConfig
from karma_ray.data.prompts import Tokenizer, encode_texts
from karma_ray.data.schema import ITEMS
from karma_ray.model.backbone import build_tiny, load_body
from karma_ray.model.backbones.tokenizer import save_tokenizer, train_tokenizer
from karma_ray.model.config import ItemEncoderConfig, ModelConfig
from karma_ray.model.interest import InterestModel
from karma_ray.model.lexical import LexicalBlock
from karma_ray.retrieval.encode import ItemTable, encode_catalog, save_embeddings
from karma_ray.retrieval.export import load_bundle, save_bundle
from tests.tiny import sequences, window
from tests.tiny_run import TINY

COLOURS = ("red", "blue", "green", "black", "white", "pink", "grey", "brown")
THINGS = ("shirt", "mug", "lamp", "chair", "kettle", "scarf", "boots", "vase", "clock", "rug",
          "belt", "plate", "fork", "sofa", "hat", "tie", "desk", "bed", "bag", "pot")  # fmt: skip
COLLATE = CollateConfig(max_history=9, max_item_tokens=10, max_query_tokens=6)


def catalog() -> Catalog:
    """160 items `i0`..`i159`: every colour of every thing."""
    rows = [
        {"item_id": f"i{n}", "title": f"{COLOURS[n % 8]} {THINGS[n // 8]}", "text": "soft and warm"}
        for n in range(len(COLOURS) * len(THINGS))
    ]
    return Catalog(pa.Table.from_pylist(rows, schema=ITEMS).drop_columns(["image"]))


def tokenizer() -> Tokenizer:
    """A BPE of the catalogue's text."""
    return train_tokenizer(iter(catalog().texts()), 400)


def checkpoint(folder: str, words: Tokenizer) -> str:
    """A small Qwen3 with an output head of its own, as a hub would hold it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        whole = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=len(words.get_vocab()),  # type: ignore[attr-defined]
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=48, head_dim=16, initializer_range=0.2, tie_word_embeddings=False,
        ))  # fmt: skip
    whole.save_pretrained(folder)
    save_tokenizer(words, folder)
    return folder


def interest_model(
    words: Tokenizer, pool: str = "eos", instruction: str = "", lexical: int = 0, llm: str = ""
) -> InterestModel:
    """An untrained model, whose LLM may be a checkpoint."""
    size = len(words.get_vocab())  # type: ignore[attr-defined]
    encoder = ItemEncoderConfig(pool=pool, instruction=instruction, lexical=lexical)  # type: ignore[arg-type]
    item = load_body(llm) if llm else build_tiny(TINY, size, 1)
    model = InterestModel(
        ModelConfig(tiny=TINY, item_encoder=encoder), item, build_tiny(TINY, size, 2), words
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
        model.item_encoder.mean.add_(0.1)
    if lexical:
        assert isinstance(model.item_encoder.words, LexicalBlock)
        model.item_encoder.words.fit(*encode_texts(words, catalog().texts(), 10))
    return model.eval()


def write_run(root: Path, *, pool: str = "eos", lexical: int = 0, pretrained: bool = False) -> str:
    """A finished run beside its prepared data; returns RUN."""
    run, words, items = RunFolder(str(root / "run")), tokenizer(), catalog()
    llm = checkpoint(str(root / "llm"), words) if pretrained else ""
    interest = interest_model(words, pool, lexical=lexical, llm=llm)
    saved = save_bundle(interest, words, COLLATE, run.bundle)
    tokens = encode_texts(words, items.texts(), COLLATE.max_item_tokens)
    vectors = encode_catalog(load_bundle(run.bundle).interest, *tokens)
    parents = {"bundle": saved["content_hash"], "items": "none"}
    save_embeddings(ItemTable(items.item_ids, items.titles, vectors, parents), run.item_embeddings)
    model = {"weights": "pretrained", "item_encoder": {"checkpoint": llm or "tiny"}}
    write_json({"model": model}, run.config)
    write_manifest(run.root, "run", data=str(root / "data"))
    _write_data(str(root / "data"))
    return run.root


def _write_data(data: str) -> None:
    """Windows of clicks on things of one colour."""
    random, rows = np.random.default_rng(0), []
    for user in range(300):
        things = random.permutation(len(THINGS))[:6]
        colour = user % len(COLOURS)
        rows.append(window([f"i{8 * thing + colour}" for thing in things], user=f"u{user}"))
    write_table(catalog().table, join(data, "items"))
    write_table(sequences(*rows), join(data, "sequences"))
    Path(data, "prepared.json").write_text(json.dumps({"data": data}), encoding="utf-8")

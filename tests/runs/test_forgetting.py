"""Forgetting in nats: the loss of both trunks on texts that are not items, before and after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from karma_ray import recipes
from karma_ray.artifacts import read_json, write_table
from karma_ray.config import override
from karma_ray.data.prompts import encode_texts
from karma_ray.data.schema import ITEMS
from karma_ray.errors import InputError
from karma_ray.model.backbone import load_body, save_body
from karma_ray.model.backbones.checkpoints import load_lm_head
from karma_ray.model.backbones.tokenizer import load_tokenizer, save_tokenizer
from karma_ray.model.lora import merged
from karma_ray.model.text_losses import next_token_loss
from karma_ray.runs.first_stages import start_stage
from karma_ray.runs.forgetting import forgetting, general_texts
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.runs.stages import Stage
from karma_ray.training.checkpoints.checkpoint import save_weights
from tests import tiny, tiny_run

pytestmark = pytest.mark.usefixtures("blank_pictures")

TEXTS = ["a warm scarf for the garden", "boots", "the red chair is soft and warm in winter",
         "blue lamp beside a green vase", "x"]  # fmt: skip
MODELS: dict[str, tuple[type[PreTrainedConfig], Any, bool]] = {
    "tied": (LlamaConfig, LlamaForCausalLM, True),
    "own head": (Qwen3Config, Qwen3ForCausalLM, False),
}
NAMES = {f"forgetting/{trunk}_{when}" for trunk in ("encoder", "decoder")
         for when in ("before", "after")}  # fmt: skip


def _checkpoint(kind: str, folder: Path) -> str:
    """A random language model of three layers."""
    config, model, tied = MODELS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        whole = model(config(
            vocab_size=len(tiny.tokenizer().get_vocab()),  # type: ignore[attr-defined]
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=48, head_dim=16, initializer_range=0.2, tie_word_embeddings=tied,
        ))  # fmt: skip
    whole.save_pretrained(folder)
    save_tokenizer(tiny.tokenizer(), str(folder))
    return str(folder)


def _theirs(checkpoint: str, texts: list[str], max_tokens: int, layers: int = 3) -> float:
    """transformers' own loss of all texts, in one padded batch."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    model.model.layers = model.model.layers[:layers]
    tokens, lengths = encode_texts(load_tokenizer(checkpoint), texts, max_tokens, end=False)
    real = torch.arange(tokens.shape[1]) < torch.from_numpy(lengths)[:, None]
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        loss = model(ids, attention_mask=real.long(), labels=ids.masked_fill(~real, -100)).loss
    return float(loss)


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_is_that_of_transformers_own_model(kind: str, tmp_path: Path) -> None:
    checkpoint = _checkpoint(kind, tmp_path)
    sample = encode_texts(load_tokenizer(checkpoint), TEXTS, 8, end=False)
    ours = next_token_loss(load_body(checkpoint).eval(), load_lm_head(checkpoint), *sample)
    assert ours == pytest.approx(_theirs(checkpoint, TEXTS, 8), abs=1e-5)


def _stage(shop: str, checkpoint: str, tmp_path: Path, *more: str) -> Stage:
    """A stage 2 whose trained weights are those that it starts with."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    config = override(recipes.build("action_only"), [
        f"model.checkpoint={checkpoint}", "warmup.skip=true", "collate.max_item_tokens=8",
        f"evaluation.general_texts={texts}", *more,
    ])  # fmt: skip
    cache = str(tmp_path / "cache")
    stage = start_stage(config, ensure_prepared(shop, config.prepare), cache)
    model = stage.build_joint()
    torch.nn.init.normal_(model.interest.user_decoder.no_query)
    save_weights(str(tmp_path / "trained"), model)
    return replace(stage, trained=str(tmp_path / "trained"))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("more", [
    (), ("model.peft=lora:2",),
    ("model.item_encoder.layers=2", "model.item_encoder.train_layers=1",
     "model.user_decoder.layers=1"),
], ids=["full", "lora", "first layers"])  # fmt: skip
def test_nothing_is_forgotten_without_a_step(
    shop: str, tmp_path: Path, kind: str, more: tuple[str, ...]
) -> None:
    checkpoint = _checkpoint(kind, tmp_path / "llm")
    found = forgetting(_stage(shop, checkpoint, tmp_path, *more), str(tmp_path / "cache"))
    assert set(found) == NAMES
    depths = {"encoder": 2, "decoder": 1} if len(more) == 3 else {"encoder": 3, "decoder": 3}
    for trunk, layers in depths.items():
        before = found[f"forgetting/{trunk}_before"]
        assert before == pytest.approx(_theirs(checkpoint, TEXTS, 8, layers), abs=1e-5)
        assert found[f"forgetting/{trunk}_after"] == pytest.approx(before, abs=1e-6)


def test_what_low_rank_adapters_learnt_counts(shop: str, tmp_path: Path) -> None:
    checkpoint = _checkpoint("tied", tmp_path / "llm")
    stage = _stage(shop, checkpoint, tmp_path, "model.peft=lora:2")
    model = stage.build_trained()
    with torch.no_grad():
        for name, value in model.interest.named_parameters():
            if "lora_B" in name:
                value.add_(0.3)
    save_weights(str(tmp_path / "trained"), model)
    found = forgetting(stage, str(tmp_path / "cache"))
    assert found["forgetting/encoder_before"] == found["forgetting/decoder_before"]
    sample = encode_texts(load_tokenizer(checkpoint), TEXTS, 8, end=False)
    for name, part in (("encoder", model.interest.item_encoder),
                       ("decoder", model.interest.user_decoder)):  # fmt: skip
        save_body(merged(part.body), str(tmp_path / name))
        merged_loss = next_token_loss(load_body(str(tmp_path / name)).eval(), None, *sample)
        assert found[f"forgetting/{name}_after"] == pytest.approx(merged_loss, abs=1e-5)
        assert abs(merged_loss - found[f"forgetting/{name}_before"]) > 1e-3


def test_texts_come_from_a_file_or_the_data_and_are_no_items(shop: str, tmp_path: Path) -> None:
    assert general_texts("", shop) == []
    plain, table = tmp_path / "t.txt", tmp_path / "t.parquet"
    plain.write_text("one text\n\n another \n")
    assert general_texts(str(plain), shop) == ["one text", "another"]
    pl.DataFrame({"text": ["one text", None, " "]}).write_parquet(table)
    assert general_texts(str(table), shop) == ["one text"]
    items = {"item_id": ["a"], "title": ["cup"], "brand": ["acme"], "text": ["of clay"]}
    pl.DataFrame(items).write_parquet(table)
    assert general_texts(str(table), shop) == ["cup | acme | of clay"]
    data = tiny_run.write_data(tmp_path)
    others = [*tiny_run.items_table().slice(0, 1).to_pylist(), {"item_id": "x", "title": "tea"}]
    write_table(pa.Table.from_pylist(others, schema=ITEMS), f"{data}/other_items")
    assert general_texts("", data) == ["tea"]
    for given, reason in ((f"{shop}/items", "no text that is not an item's"),
                          (str(tmp_path / "none"), "does not exist"),
                          (f"{shop}/events", "neither a column text")):  # fmt: skip
        with pytest.raises(InputError, match=f"evaluation.general_texts: .*{reason}"):
            general_texts(given, shop)


def test_a_run_records_what_it_forgot_and_keeps_it(shop: str, tmp_path: Path) -> None:
    from karma_ray.runs.pipeline import evaluate_run, train_run

    cache, run, texts = str(tmp_path / "cache"), str(tmp_path / "run"), tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    config = override(recipes.build("action_only"), [
        "model.tiny.hidden_size=32", "model.tiny.num_heads=2", "model.tiny.num_key_value_heads=1",
        "model.tiny.intermediate_size=64", "pretrain.steps=3", "warmup.steps=2",
        "training.steps=3", "training.num_workers=0", "training.threads_per_worker=1",
        "training.batch_size=8", "evaluation.max_examples=20",
        f"evaluation.general_texts={texts}",
    ])  # fmt: skip
    metrics = train_run(config, shop, run, cache=cache)
    assert {name for name in metrics if name.startswith("forgetting/")} == NAMES
    assert all(0 < metrics[name] < 12 for name in NAMES)
    assert metrics["forgetting/decoder_before"] != metrics["forgetting/decoder_after"]
    (kept,) = Path(cache).glob("forgetting-*.json")  # both trunks start from one model
    assert read_json(str(kept))["loss"] == metrics["forgetting/encoder_before"]
    _, again = evaluate_run(run, cache=cache)
    assert {name: again[name] for name in NAMES} == {name: metrics[name] for name in NAMES}

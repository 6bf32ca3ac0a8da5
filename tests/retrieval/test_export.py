"""The bundle holds what serves, bit by bit, and nothing of the training decoders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors import safe_open

from karma_ray.errors import InputError, KarmaRayError
from karma_ray.model.karma import KarmaModel
from karma_ray.model.lora import adapt, is_low_rank
from karma_ray.retrieval.encode import encode_catalog
from karma_ray.retrieval.export import load_bundle, save_bundle
from karma_ray.retrieval.requests import HistoryItem, Request, request_table
from karma_ray.retrieval.retriever import Retriever
from tests import tiny_run

REQUESTS = [
    Request("red mug", [HistoryItem("i1", "shirt"), HistoryItem("i30", None)]),
    Request("", [HistoryItem("i7")]),
    Request("lamp"),
]
TRAIN_ONLY = ("lm_head", "decodab", "recon", "decoder_copy", "text_start", "special")


def karma(score: str = "rms_dot") -> tuple[KarmaModel, object]:
    words = tiny_run.tokenizer()
    return KarmaModel(tiny_run.interest_model(words, score=score), words).eval(), words


def keys(folder: Path) -> list[str]:
    found = []
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            found += [f"{file.relative_to(folder)}:{key}" for key in tensors.keys()]  # noqa: SIM118
    return found


def scores(interest, words) -> np.ndarray:
    items = tiny_run.catalog()
    embeddings = encode_catalog(interest, *tiny_run.item_tokens(words, items))
    retriever = Retriever.from_model(interest, tiny_run.collator(words, items), items, embeddings)
    return retriever.score(request_table(REQUESTS))


def test_the_bundle_has_the_documented_files_and_no_train_only_key(tmp_path) -> None:
    model, words = karma()
    save_bundle(model.interest, words, tiny_run.COLLATE, str(tmp_path / "bundle"))
    folder = tmp_path / "bundle"
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.json", "manifest.json", "adapters.safetensors",
        "item_encoder", "user_decoder", "tokenizer",
    }  # fmt: skip
    assert len(keys(folder)) > 20
    for word in TRAIN_ONLY:
        assert not [key for key in keys(folder) if word in key.lower()]
    assert "decodab" not in (folder / "config.json").read_text()


def test_every_weight_of_the_interest_model_is_in_the_bundle_once(tmp_path) -> None:
    model, words = karma()
    save_bundle(model.interest, words, tiny_run.COLLATE, str(tmp_path))
    assert len(keys(tmp_path)) == len(model.interest.state_dict())


@pytest.mark.parametrize("score", ["rms_dot", "dot", "cos_learned"])
def test_scores_before_and_after_export_are_bitwise_equal(tmp_path, score: str) -> None:
    model, words = karma(score)
    save_bundle(model.interest, words, tiny_run.COLLATE, str(tmp_path))
    bundle = load_bundle(str(tmp_path))
    assert np.array_equal(scores(bundle.interest, bundle.tokenizer), scores(model.interest, words))


def test_low_rank_adapters_are_merged_into_plain_folders_and_scores_stay(tmp_path) -> None:
    from transformers import AutoModel

    model, words = karma()
    interest = model.interest
    plain = scores(interest, words)
    generator = torch.Generator().manual_seed(0)
    for part in (interest.item_encoder, interest.user_decoder):
        adapt(part.body, rank=4, seed=0)
    assert np.array_equal(scores(interest, words), plain)
    with torch.no_grad():
        for name, value in interest.named_parameters():
            if is_low_rank(name):
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    before = {name: value.clone() for name, value in interest.state_dict().items()}
    save_bundle(interest, words, tiny_run.COLLATE, str(tmp_path))
    for name, value in interest.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not [key for key in keys(tmp_path) if "lora" in key or "base_layer" in key]
    assert "peft" not in (tmp_path / "config.json").read_text()
    bundle = load_bundle(str(tmp_path))
    assert not [p for p in bundle.interest.modules() if type(p).__module__.startswith("peft")]
    adapted, loaded = scores(interest, words), scores(bundle.interest, bundle.tokenizer)
    assert np.abs(adapted - plain).max() > 0.1
    # The scores are 32 times a cosine.
    np.testing.assert_allclose(loaded, adapted, atol=32e-5, rtol=0)
    body = AutoModel.from_pretrained(tmp_path / "user_decoder", dtype=torch.float32)
    for name, value in bundle.interest.user_decoder.body.state_dict().items():
        assert torch.equal(body.state_dict()[name], value)


def test_the_stripped_interest_is_the_training_interest(tmp_path) -> None:
    model, words = karma()
    save_bundle(model.interest, words, tiny_run.COLLATE, str(tmp_path))
    bundle = load_bundle(str(tmp_path))
    items = tiny_run.catalog()
    collator = tiny_run.collator(words, items)
    collator.item_tokens, collator.item_lengths = tiny_run.item_tokens(words, items)
    row = {
        "user_id": "u", "queries": ["mug", "lamp", ""], "item_ids": ["i5", "i12", "i6"],
        "timestamps": None, "page_ids": ["a", "b", "c"], "hard_negative_ids": [["i2"], [], []],
        "loss_mask": [True, True, True],
    }  # fmt: skip
    from karma_ray.data.schema import SEQUENCES

    batch = collator.training(pa.Table.from_pylist([row], schema=SEQUENCES), np.zeros(1, np.int64))
    with torch.no_grad():
        e = model.interest.encode_items(batch.item_tokens, batch.item_lengths)
        training, text = model.forward_with_text(batch, e)
        stripped = bundle.interest.interest(
            batch, bundle.interest.encode_items(batch.item_tokens, batch.item_lengths)
        )
    assert len(text.states) > 0
    torch.testing.assert_close(stripped, training, atol=2e-5, rtol=1e-4)


def test_the_item_encoder_loads_with_plain_transformers(tmp_path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, words = karma()
    save_bundle(model.interest, words, tiny_run.COLLATE, str(tmp_path))
    body = AutoModel.from_pretrained(tmp_path / "item_encoder", dtype=torch.float32)
    for name, value in model.interest.item_encoder.body.state_dict().items():
        assert torch.equal(body.state_dict()[name], value)
    plain = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert plain(["red mug"])["input_ids"] == words(["red mug"])["input_ids"]


def test_the_manifest_carries_the_facts_and_hash_follows_the_weights(tmp_path) -> None:
    model, words = karma()
    first = save_bundle(
        model.interest, words, tiny_run.COLLATE, str(tmp_path / "a"), {"recipe": "toy"}
    )
    same = save_bundle(model.interest, words, tiny_run.COLLATE, str(tmp_path / "b"))
    with torch.no_grad():
        model.interest.user_decoder.readout.weight.add_(1e-3)
    other = save_bundle(model.interest, words, tiny_run.COLLATE, str(tmp_path / "c"))
    assert first["kind"] == "bundle" and first["recipe"] == "toy" and first["width"] == 32
    assert first["content_hash"] == same["content_hash"] != other["content_hash"]
    assert load_bundle(str(tmp_path / "a")).content_hash == first["content_hash"]


def test_a_bundle_can_be_kept_on_any_fsspec_filesystem() -> None:
    model, words = karma()
    save_bundle(model.interest, words, tiny_run.COLLATE, "memory://runs/x/bundle")
    bundle = load_bundle("memory://runs/x/bundle")
    for name, value in model.interest.state_dict().items():
        assert torch.equal(bundle.interest.state_dict()[name], value)
    assert bundle.collate_config == tiny_run.COLLATE and not bundle.interest.training


def test_where_features_of_images_lay_is_not_told(tmp_path) -> None:
    model, words = karma()
    trained_with = replace(tiny_run.COLLATE, visual_features="s3://secret-bucket/features")
    save_bundle(model.interest, words, trained_with, str(tmp_path))
    assert load_bundle(str(tmp_path)).collate_config == tiny_run.COLLATE
    assert "secret-bucket" not in (tmp_path / "config.json").read_text()


def test_a_folder_that_is_no_bundle_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="manifest"):
        load_bundle(str(tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "index"}))
    with pytest.raises(InputError, match="bundle"):
        load_bundle(str(tmp_path))


def test_adapters_of_another_variant_are_named_in_the_error(tmp_path) -> None:
    model, words = karma("dot")
    save_bundle(model.interest, words, tiny_run.COLLATE, str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["score"]["kind"] = "cos_learned"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KarmaRayError, match=r"log_scale.*interest_norm"):
        load_bundle(str(tmp_path))


def test_a_setting_that_this_version_does_not_know_is_named(tmp_path) -> None:
    model, words = karma()
    uri = str(tmp_path / "bundle")
    save_bundle(model.interest, words, tiny_run.COLLATE, uri)
    path = tmp_path / "bundle" / "config.json"
    config = json.loads(path.read_text())
    config["model"]["user_decoder"]["history_mean"] = False
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"another version of karma_ray.*history_mean"):
        load_bundle(uri)

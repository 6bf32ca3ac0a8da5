"""The real library sentence-transformers computes our vectors from an exported item encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from karma_ray.data.prompts import Tokenizer, encode_texts
from karma_ray.errors import InputError
from karma_ray.model.backbone import build_tiny
from karma_ray.model.backbones.gguf_file import SPLITS, split_as
from karma_ray.model.backbones.registry import FAMILIES
from karma_ray.model.config import ItemEncoderConfig, ModelConfig
from karma_ray.model.interest import InterestModel
from karma_ray.retrieval.encode import load_embeddings
from karma_ray.retrieval.export import load_bundle, save_bundle
from karma_ray.retrieval.sentence_encoder import POOLS, export_encoder
from tests import multimodal, tiny, tiny_run
from tests.baselines.test_sequential import recommender

TEXTS = [
    "red mug", "", "  Größe 42\n", "white vase <|endoftext|> soft", "blue",
    "a text that is far longer than the eight tokens which an item may have in this run",
]  # fmt: skip


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def model_of(family: str = "qwen3", words: Tokenizer | None = None, **fields) -> InterestModel:
    """A whitened tiny model, so that the mean to be folded in is not 0."""
    words = words or tiny_run.tokenizer()
    size = len(words.get_vocab())  # type: ignore[attr-defined]
    build = FAMILIES[family].tiny
    assert build is not None
    bodies = [build(tiny_run.TINY, size, 1), build_tiny(tiny_run.TINY, size, 2)]
    config = ModelConfig(tiny=tiny_run.TINY, item_encoder=ItemEncoderConfig(**fields))
    interest = InterestModel(config, *bodies, words, 0).eval()
    tokens, lengths = tiny_run.item_tokens(words, tiny_run.catalog())
    interest.item_encoder.whiten(torch.from_numpy(tokens).long(), torch.from_numpy(lengths))
    return interest


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def library_vectors(folder: Path, texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return model.encode(texts, batch_size=4)


def our_vectors(run: str, texts: list[str]) -> np.ndarray:
    bundle = load_bundle(f"{run}/bundle")
    most = bundle.collate_config.max_item_tokens
    tokens, lengths = encode_texts(bundle.tokenizer, texts, most)
    with torch.no_grad():
        vectors = bundle.interest.encode_items(
            torch.from_numpy(tokens).long(), torch.from_numpy(lengths)
        )
    return unit(vectors.numpy())


@pytest.mark.parametrize("pool", ["eos", "emb_token", "mean"])
@pytest.mark.parametrize("instruction", ["", "an item of a shop:"])
def test_the_library_computes_our_vectors(tmp_path: Path, pool: str, instruction: str) -> None:
    run = tiny_run.write_run(tmp_path, interest=model_of(pool=pool, instruction=instruction))
    out = tmp_path / "out"
    export_encoder(run, str(out))
    found = library_vectors(out, TEXTS)
    np.testing.assert_allclose(found, our_vectors(run, TEXTS), atol=1e-5)
    assert not np.allclose(found[0], found[4], atol=0.01)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_bodies_of_other_families_are_read_by_the_library(tmp_path: Path, family: str) -> None:
    words = tiny_run.tokenizer()
    if family == "qwen2":
        split_as(words.backend_tokenizer, SPLITS["qwen2"])
    uri = str(tmp_path / "run/bundle")
    save_bundle(model_of(family, words, pool="mean"), words, tiny_run.COLLATE, uri)
    export_encoder(str(tmp_path / "run"), str(tmp_path / "out"))
    found = library_vectors(tmp_path / "out", TEXTS)
    np.testing.assert_allclose(found, our_vectors(str(tmp_path / "run"), TEXTS), atol=1e-5)


def test_a_tokenizer_that_transformers_would_replace_is_refused(tmp_path: Path) -> None:
    """It loads Qwen2's own for that architecture, which puts no space before a text."""
    run = tiny_run.write_run(tmp_path, interest=model_of("qwen2"))
    with pytest.raises(InputError, match=r"checkpoint.*another tokenizer"):
        export_encoder(run, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_mean_far_longer_than_what_varies_costs_no_digits(tmp_path: Path) -> None:
    """As in language models, whose pooled states are nearly equal."""
    interest = model_of()
    encoder = interest.item_encoder
    with torch.no_grad():
        encoder.body.embed_tokens.weight.mul_(1e-3).add_(1)  # type: ignore[union-attr]
    tokens, lengths = tiny_run.item_tokens(tiny_run.tokenizer(), tiny_run.catalog())
    encoder.whiten(torch.from_numpy(tokens).long(), torch.from_numpy(lengths))
    run = tiny_run.write_run(tmp_path, interest=interest)
    export_encoder(run, str(tmp_path / "out"))
    dense = load_file(tmp_path / "out/2_Dense/model.safetensors")
    states = encoder.pooled(torch.from_numpy(tokens).long(), torch.from_numpy(lengths))
    centred = torch.nn.functional.linear(states, dense["linear.weight"], dense["linear.bias"])
    assert torch.equal(centred, states - encoder.mean)


def test_every_pool_has_a_mode_of_the_library() -> None:
    assert set(POOLS) == set(get_args(get_type_hints(ItemEncoderConfig)["pool"]))


def test_the_library_computes_the_vectors_of_the_index(tmp_path: Path) -> None:
    run = tiny_run.write_run(tmp_path)
    export_encoder(run, str(tmp_path / "out"))
    found = library_vectors(tmp_path / "out", tiny_run.catalog().texts())
    stored = load_embeddings(f"{run}/item_embeddings").embeddings
    np.testing.assert_allclose(found, unit(stored), atol=1e-5)


def test_the_folder_names_its_length_and_has_a_card(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    run = tiny_run.write_run(tmp_path, interest=model_of(instruction="item:"))
    facts = export_encoder(run, str(tmp_path / "out"))
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu", local_files_only=True)
    instruction = load_bundle(f"{run}/bundle").interest.item_encoder.instruction
    assert model.max_seq_length == facts["max_tokens"] == 8 + len(instruction)
    assert model.get_embedding_dimension() == 32
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: sentence-transformers\n")
    assert "`item:`" in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    ("checkpoint", "named"), [("Qwen/Qwen3-0.6B", True), ("/a/folder", False), ("tiny", False)]
)
def test_the_card_names_the_base_model_if_others_can_fetch_it(
    tmp_path: Path, checkpoint: str, named: bool
) -> None:
    run = tiny_run.write_run(tmp_path)
    config = {"model": {"item_encoder": {"checkpoint": checkpoint}}}
    Path(run, "config.json").write_text(json.dumps(config), encoding="utf-8")
    export_encoder(run, str(tmp_path / "out"))
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert (f"base_model: {checkpoint}\n" in card) == named
    assert "/a/folder" not in card


def test_counted_words_are_refused(tmp_path: Path) -> None:
    words = tiny_run.tokenizer()
    save_bundle(model_of(lexical=4), words, tiny_run.COLLATE, str(tmp_path / "run/bundle"))
    with pytest.raises(InputError, match=r"model.item_encoder.lexical.*counted words"):
        export_encoder(str(tmp_path / "run"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_encoder_of_pictures_is_refused(tmp_path: Path) -> None:
    interest = multimodal.model().interest
    save_bundle(interest, tiny.tokenizer(), tiny.PLAIN, str(tmp_path / "run/bundle"))
    with pytest.raises(InputError, match=r"model.item_encoder.modality.*inserts pictures"):
        export_encoder(str(tmp_path / "run"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_baseline_over_ids_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "run/bundle")
    save_bundle(recommender("sasrec"), tiny.tokenizer(), tiny.PLAIN, uri)
    with pytest.raises(InputError, match=r"RUN.*encodes no text"):
        export_encoder(str(tmp_path / "run"), str(tmp_path / "out"))


def test_a_folder_with_files_is_refused_and_an_empty_one_is_filled(tmp_path: Path) -> None:
    run = tiny_run.write_run(tmp_path)
    (tmp_path / "out").mkdir()
    export_encoder(run, str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"OUT.*not an empty folder"):
        export_encoder(run, str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"RUN.*does not exist"):
        export_encoder(str(tmp_path / "none"), str(tmp_path / "other"))

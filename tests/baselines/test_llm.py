"""The floors of a pretrained LLM: whitened mean states, the query and the weighted history."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaModel

from karma_ray import recipes
from karma_ray.artifacts import join, read_json, write_table
from karma_ray.baselines.floors import build_floor
from karma_ray.baselines.llm import DECAY, QUERY_WEIGHT, LlmAffinityRanker, LlmRanker, TextVectors
from karma_ray.config import Config, override
from karma_ray.data.prepared import QueryMatches
from karma_ray.data.prompts import encode_texts
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.errors import InputError
from karma_ray.model.backbones.tokenizer import load_tokenizer, save_tokenizer
from karma_ray.runs.continuation import check_sizes
from karma_ray.runs.evaluator import Evaluator
from karma_ray.runs.floor_metrics import floor_metrics
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.runs.text_vectors import LlmTexts
from karma_ray.studies.plan import Data, named_rows, possible_rows
from tests import tiny_run

WORDS = {"": 9, "mug": 4}  # texts -> the item whose vector they have


@pytest.fixture
def vectors() -> TextVectors:
    """Eight items at the angles 0, 10, .. 70 degrees."""
    angles = np.radians(np.arange(8) * 10)
    items = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    return TextVectors(items, lambda texts: items[[WORDS[text] for text in texts]])


def test_scores_are_the_cosines_of_query_and_history(catalog, requests_table, vectors) -> None:
    table = requests_table(
        [("mug", ["b", "zzz", "d"]), (None, ["b", "d"]), ("mug", []), (" ", ["zzz"])]
    )
    both, taste, query, nothing = LlmRanker(catalog, vectors).score(table)
    of = vectors.items
    mean = DECAY * of[1] + of[3]
    expected = of @ (mean / np.linalg.norm(mean))
    np.testing.assert_allclose(taste, expected, atol=1e-6)
    np.testing.assert_allclose(query, QUERY_WEIGHT * of @ of[4], atol=1e-6)
    np.testing.assert_allclose(both, taste + query, atol=1e-6)
    assert not nothing.any()


def test_matching_items_come_first_and_the_history_orders_them(
    catalog, requests_table, vectors
) -> None:
    ranker = LlmAffinityRanker(catalog, QueryMatches(catalog), vectors)
    (scores,) = ranker.score(requests_table([("mug", ["h"])]))
    order = [catalog.item_ids[row] for row in np.argsort(-scores)]
    assert order == ["g", "f", "e", "h", "d", "c", "b", "a"]
    (scores,) = ranker.score(requests_table([("mug", [])]))
    assert len(set(scores[4:7])) == 1 and scores[4] > scores[0] == scores[7]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of three layers with the vocabulary of the toy catalogue."""
    folder = str(tmp_path_factory.mktemp("llm"))
    words = tiny_run.tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaModel(
            LlamaConfig(
                vocab_size=len(words.get_vocab()),  # type: ignore[attr-defined]
                hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                num_key_value_heads=1, intermediate_size=24, initializer_range=0.3,
                tie_word_embeddings=True,
            )
        ).save_pretrained(folder)  # fmt: skip
    save_tokenizer(words, folder)
    return folder


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("shop"))
    write_toy_shop(folder, ToyShopConfig(num_items=240, num_users=60))
    return folder


def _config(checkpoint: str, *more: str) -> Config:
    names = [f"model.checkpoint={checkpoint}", "model.item_encoder.layers=2"]
    return override(recipes.build("llm"), [*names, "collate.max_item_tokens=8", *more])


def _by_hand(checkpoint: str, texts: list[str]) -> np.ndarray:
    """Mean states of transformers' own model after two layers and its last norm, text by text."""
    model = AutoModel.from_pretrained(checkpoint).eval()
    model.layers = model.layers[:2]
    tokens, lengths = encode_texts(load_tokenizer(checkpoint), texts, 8)
    with torch.no_grad():
        rows = [
            model(torch.from_numpy(row[None, :n].astype(np.int64))).last_hidden_state[0].mean(0)
            for row, n in zip(tokens, lengths, strict=True)
        ]
    return torch.stack(rows).double().numpy()


def test_vectors_are_whitened_mean_states(checkpoint: str, tmp_path: Path) -> None:
    data, cache = tiny_run.write_data(tmp_path), str(tmp_path / "cache")
    found = LlmTexts.of(_config(checkpoint), data, cache)
    assert found is not None
    vectors = LlmTexts(found.config, found.max_tokens, data, cache, "float32").vectors()
    states = _by_hand(checkpoint, tiny_run.catalog().texts())
    mean = states.mean(0)
    variances, axes = np.linalg.eigh((states - mean).T @ (states - mean) / len(states))
    # A rotation is free: the whitened states' inner products are those of any whitening.
    white = (states - mean) @ axes / np.sqrt(variances + 0.01 * variances.max())
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors.items @ vectors.items.T, white @ white.T, atol=2e-4)
    queries = _by_hand(checkpoint, ["red mug", "warm boots"])
    asked = (queries - mean) @ axes / np.sqrt(variances + 0.01 * variances.max())
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    found_queries = vectors.encode(["red mug", "warm boots"])
    np.testing.assert_allclose(found_queries @ vectors.items.T, asked @ white.T, atol=2e-4)
    half = found.vectors()  # as a run computes them
    assert np.abs((half.items * vectors.items).sum(1) - 1).max() < 0.05


def test_vectors_are_computed_once_per_content(checkpoint: str, tmp_path: Path) -> None:
    data, cache = tiny_run.write_data(tmp_path), str(tmp_path / "cache")
    texts = LlmTexts.of(_config(checkpoint), data, cache)
    assert texts is not None
    first = texts.vectors().items
    (made,) = Path(cache).glob("text-vectors-*.npz")
    stamp = made.stat().st_mtime_ns
    again = LlmTexts.of(_config(checkpoint, "model.item_encoder.pool=mean"), data, cache)
    assert again is not None and np.array_equal(again.vectors().items, first)
    assert made.stat().st_mtime_ns == stamp
    for change in ("model.item_encoder.layers=1", "collate.max_item_tokens=5",
                   "model.weights=random"):  # fmt: skip
        other = LlmTexts.of(_config(checkpoint, change), data, cache)
        assert other is not None and other.key() != texts.key()
    write_table(tiny_run.items_table().slice(0, 30), join(data, "items"))
    assert texts.key() != made.stem.removeprefix("text-vectors-")


def test_these_floors_are_measured_where_a_model_is_named(
    checkpoint: str, shop: str, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    for settings in (override(Config(), ["evaluation.max_examples=20"]),
                     _config(checkpoint, "evaluation.max_examples=20")):  # fmt: skip
        evaluator = Evaluator(settings, ensure_prepared(shop, settings.prepare))
        found = floor_metrics(evaluator, cache)
        named = settings.model.item_encoder.checkpoint != "tiny"
        assert {name in found for name in recipes.LLM_FLOORS} == {named}
        assert "affinity" in found and floor_metrics(evaluator, cache) == found
    files = [read_json(str(path)) for path in Path(cache).glob("floors-*.json")]
    assert sorted(len(file) for file in files) == [2, len(found) - 2]
    gone = _config(str(tmp_path / "gone"), "evaluation.max_examples=20")
    assert "llm" not in floor_metrics(Evaluator(gone, evaluator.source), cache)


def test_without_a_model_the_recipe_is_refused_and_the_row_left_out(shop: str) -> None:
    source = ensure_prepared(shop, Config().prepare)
    with pytest.raises(InputError, match="--recipe: 'llm' needs a pretrained language model"):
        build_floor("llm", source)
    with pytest.raises(InputError, match="--recipe: 'llm' needs a pretrained language model"):
        check_sizes(recipes.build("llm"), source, with_warmup=False)
    rows, data = named_rows("baselines", "llm,llm_affinity,affinity"), Data.open(shop)
    allowed, reasons = possible_rows(rows, data)
    assert [row.name for row in allowed] == ["affinity"] and set(reasons) == {"llm", "llm_affinity"}
    assert not possible_rows(rows, data, ["model.checkpoint=x"])[1]

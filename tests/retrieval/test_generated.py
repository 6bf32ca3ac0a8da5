"""What is generated is what serves: the same in memory, in a bundle, and however it is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from karma_ray.retrieval.encode import encode_catalog
from karma_ray.retrieval.export import load_bundle, save_bundle
from karma_ray.retrieval.filters import merged
from karma_ray.retrieval.requests import HistoryItem, Request, request_table
from karma_ray.retrieval.retriever import Retriever
from tests import generating, tiny_run

REQUESTS = [
    Request("red lamp", [HistoryItem("i1"), HistoryItem("i7")]),
    Request(None, [HistoryItem("i30")]),
    Request("blue cup", []),
]


KEY_OF_THE_FIRST = 7215818933172166496
"""blake2b of `red lamp`, `i1` and `i7`, 0x1f between them, 8 bytes, little-endian."""


def _retriever(**fields: Any) -> Retriever:
    words, catalog = tiny_run.tokenizer(), tiny_run.catalog()
    interest = generating.add_generator(tiny_run.interest_model(words), **fields).eval()
    assert interest.generator is not None
    vectors = encode_catalog(interest, *tiny_run.item_tokens(words, catalog))
    interest.generator.observe(torch.from_numpy(vectors))
    return Retriever.from_model(interest, tiny_run.collator(words, catalog), catalog, vectors)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "mse"},
        {"kind": "fm", "steps": 3},
        {"kind": "edm", "samples": 3, "agg": "mean", "steps": 4},
        {"kind": "ddpm_v", "samples": 4, "agg": "union", "steps": 5},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_recall_score_and_score_items_agree(fields: dict[str, Any]) -> None:
    retriever = _retriever(**fields)
    scores = retriever.score(request_table(REQUESTS))
    recalled = retriever.recall_batch(REQUESTS, k=15)
    for request, row, answer in zip(REQUESTS, scores, recalled, strict=True):
        assert len({item.item_id for item in answer.items}) == 15
        wanted = np.sort(row)[::-1][:15]
        np.testing.assert_allclose([item.score for item in answer.items], wanted, rtol=1e-5)
        ids = [item.item_id for item in answer.items]
        given = retriever.score_items(request.query, request.history, ids).scores
        np.testing.assert_allclose(given, wanted, rtol=1e-5)


def test_it_is_not_h_that_searches() -> None:
    generated = _retriever(kind="fm")
    h = generated.interests(request_table(REQUESTS))
    found = generated._vectors(request_table(REQUESTS))[:, 0]
    cosine = torch.cosine_similarity(found, generated.interest.query_vectors(h))
    assert cosine.abs().max() < 0.9


@pytest.mark.parametrize("kind", ["mse", "fm"])
def test_a_bundle_brings_the_generator_with_its_statistics(tmp_path: Path, kind: str) -> None:
    retriever = _retriever(kind=kind, samples=2, agg="union")
    interest, words = retriever.interest, tiny_run.tokenizer()
    save_bundle(interest, words, tiny_run.COLLATE, str(tmp_path))  # type: ignore[arg-type]
    loaded = load_bundle(str(tmp_path)).interest
    rows = torch.randn(3, interest.width)
    keys = np.arange(3)
    torch.testing.assert_close(
        loaded.search_vectors(rows, keys), interest.search_vectors(rows, keys)
    )


@pytest.mark.parametrize("kind", ["mse", "fm"])
def test_requests_of_equal_h_do_not_share_a_draw(kind: str, monkeypatch: Any) -> None:
    retriever = _retriever(kind=kind, steps=3)
    h = retriever.interests(request_table(REQUESTS[:1]))
    monkeypatch.setattr(retriever, "interests", lambda examples: h.expand(len(examples), -1))
    found = retriever.score(request_table(REQUESTS))
    same = [np.allclose(found[0], row) for row in found[1:]]
    assert same == ([True, True] if kind == "mse" else [False, False])


def test_what_the_model_does_not_read_draws_nothing() -> None:
    """Unknown items, and those in front of the longest history that is read."""
    retriever, history = _retriever(kind="fm", steps=3), [HistoryItem(f"i{n}") for n in range(5)]
    plain = Request("red lamp", history)
    others = [
        Request("red lamp", [HistoryItem("nobody"), *history]),
        Request("red lamp", [HistoryItem("i30"), HistoryItem("i31"), *history]),
    ]
    assert retriever.collator.config.max_history == len(history)
    wanted, *found = retriever.score(request_table([plain, *others]))
    for row in found:
        np.testing.assert_allclose(row, wanted, rtol=1e-5)
    shorter = retriever.score(request_table([Request("red lamp", history[1:])]))
    assert not np.allclose(shorter[0], wanted, rtol=1e-2)


def test_a_request_draws_by_what_it_is() -> None:
    asked, repeated = REQUESTS[:1], [REQUESTS[1], REQUESTS[0]]
    retriever = _retriever(kind="fm", steps=3)
    keys = retriever.keys(request_table(asked)), retriever.keys(request_table(repeated))
    assert keys[0][0] == keys[1][1] != keys[1][0]
    assert keys[0].dtype == np.int64
    assert keys[0].tolist() == [KEY_OF_THE_FIRST], "another key on another day or machine"
    (alone,), (_, beside) = (retriever.recall_batch(rows, k=5) for rows in (asked, repeated))
    assert [item.item_id for item in alone.items] == [item.item_id for item in beside.items]


def test_a_bundle_without_generator_says_nothing_of_it(tmp_path: Path) -> None:
    words = tiny_run.tokenizer()
    save_bundle(tiny_run.interest_model(words), words, tiny_run.COLLATE, str(tmp_path))
    assert "generator" not in json.loads((tmp_path / "config.json").read_text())["model"]


def test_lists_are_merged_by_their_best_scores() -> None:
    rows = np.array([[4, 2, 9, 2, 7, 4], [1, -1, -1, 3, -1, -1]])
    scores = np.array([[0.9, 0.5, 0.1, 0.8, 0.6, 0.2], [0.3, 0, 0, 0.4, 0, 0]], np.float32)
    found, values = merged(rows, scores, 3)
    assert found.tolist() == [[4, 2, 7], [3, 1, -1]]
    np.testing.assert_allclose(values, [[0.9, 0.8, 0.6], [0.4, 0.3, 0]])

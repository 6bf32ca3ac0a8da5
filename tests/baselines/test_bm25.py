"""The BM25 floor."""

from __future__ import annotations

from math import log

import numpy as np
import pytest

from karma_ray.baselines.bm25 import Bm25Ranker
from karma_ray.baselines.floors import build_floor
from karma_ray.metrics.semantic import terms


def brute_force(asked: list[str], texts: list[list[str]], item: int) -> float:
    """Okapi BM25 as the textbook has it: k1 = 1.2, b = 0.75, idf above 0; mean over the terms."""
    length, total = sum(map(len, texts)) / len(texts), 0.0
    for term in asked:
        found = sum(term in text for text in texts)
        f = texts[item].count(term)
        idf = log(1 + (len(texts) - found + 0.5) / (found + 0.5))
        total += idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(texts[item]) / length))
    return total / max(len(asked), 1)


def test_it_is_the_textbook_formula(catalog, requests_table) -> None:
    requests = [("red clay mug mug", []), ("shirt zzz", ["c", "g"]), (None, ["a", "a", "h"])]
    scores = Bm25Ranker(catalog).score(requests_table(requests))
    texts = [terms(text) for text in catalog.texts()]
    for row, (query, history) in enumerate(requests):
        # A term that no text has scores nothing and does not count.
        asked = [term for term in terms(query or "") if term != "zzz"]
        asking = [texts[catalog.item_ids.index(item)] for item in history]
        for item in range(catalog.num_items):
            past = [brute_force(words, texts, item) for words in asking]
            wanted = brute_force(asked, texts, item) + (sum(past) / len(past) if past else 0.0)
            assert scores[row, item] == pytest.approx(wanted, rel=1e-5)


def test_the_item_that_the_query_spells_comes_first(catalog, requests_table) -> None:
    scores = Bm25Ranker(catalog).score(requests_table([("red clay mug", []), ("green", [])]))
    assert [catalog.item_ids[row] for row in scores.argmax(axis=1)] == ["g", "h"]


def test_the_history_pulls_towards_its_items(catalog, requests_table) -> None:
    requests = [("shirt", []), ("shirt", ["d"]), ("shirt", ["d", "unknown item"])]
    plain, pulled, same = Bm25Ranker(catalog).score(requests_table(requests))
    blue_wool = catalog.item_ids.index("d")
    assert (pulled - plain)[blue_wool] > 0 and pulled.argmax() == blue_wool
    assert (pulled == same).all()


def test_an_empty_request_scores_every_item_alike(catalog, requests_table) -> None:
    scores = Bm25Ranker(catalog).score(requests_table([(None, []), ("", ["unknown item"])]))
    assert (scores == 0).all()


def test_more_requests_than_a_block_equal_one_by_one(catalog, requests_table) -> None:
    ranker = Bm25Ranker(catalog)
    table = requests_table([("red shirt", ["e"]), ("blue mug", ["c", "a"])] * 40)
    alone = [ranker.score(table.slice(row, 1)) for row in range(table.num_rows)]
    np.testing.assert_allclose(ranker.score(table), np.concatenate(alone), rtol=1e-6)


def test_it_is_a_floor_by_name(catalog) -> None:
    class Data:
        def catalog(self):
            return catalog

    assert isinstance(build_floor("bm25", Data()), Bm25Ranker)

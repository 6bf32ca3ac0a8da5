"""The TF-IDF floor."""

from __future__ import annotations

import numpy as np

from karma_ray.baselines.tfidf import TfidfRanker


def test_the_item_that_the_query_spells_comes_first(catalog, requests_table) -> None:
    scores = TfidfRanker(catalog).score(requests_table([("red clay mug", []), ("green", [])]))
    assert [catalog.item_ids[row] for row in scores.argmax(axis=1)] == ["g", "h"]


def test_the_history_pulls_towards_its_items(catalog, requests_table) -> None:
    requests = [("shirt", []), ("shirt", ["d"]), ("shirt", ["d", "unknown item"])]
    plain, pulled, same = TfidfRanker(catalog).score(requests_table(requests))
    blue_wool = catalog.item_ids.index("d")
    assert (pulled - plain)[blue_wool] > 0 and pulled.argmax() == blue_wool
    assert (pulled == same).all()


def test_an_empty_request_scores_every_item_alike(catalog, requests_table) -> None:
    scores = TfidfRanker(catalog).score(requests_table([(None, []), ("", ["unknown item"])]))
    assert (scores == 0).all()


def test_more_requests_than_a_block_equal_one_by_one(catalog, requests_table) -> None:
    ranker = TfidfRanker(catalog)
    table = requests_table([("red shirt", ["e"]), ("blue mug", ["c", "a"])] * 40)
    together = ranker.score(table)
    alone = [ranker.score(table.slice(row, 1)) for row in range(table.num_rows)]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-6)


def test_the_order_of_the_catalogue_changes_nothing(catalog, shuffled, requests_table) -> None:
    other, order = shuffled
    table = requests_table([("red shirt", ["e", "f"])])
    moved = TfidfRanker(other).score(table)
    np.testing.assert_allclose(moved, TfidfRanker(catalog).score(table)[:, order], rtol=1e-5)

"""The floors behind a hard match of the query."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from karma_ray.baselines.popularity import training_clicks
from karma_ray.baselines.query_filter import (
    PopularQueryFilterRanker,
    QueryFilterRanker,
    behind_match,
)
from karma_ray.data.prepared import QueryMatches


def test_matching_items_stand_before_all_others(
    catalog, matches, sequences, requests_table
) -> None:
    table = requests_table([("red shirt", []), ("mug", ["a"])])
    clicks = training_clicks(sequences, catalog)
    rankers = [QueryFilterRanker(catalog, matches), PopularQueryFilterRanker(clicks, matches)]
    for ranker in rankers:
        for scores, query in zip(ranker.score(table), ["red shirt", "mug"], strict=True):
            rows = matches.rows(query)
            others = np.setdiff1d(np.arange(catalog.num_items), rows)
            assert 0 < len(rows) < catalog.num_items
            assert scores[rows].min() > scores[others].max()


def test_popularity_orders_both_parts_and_ties_stay_ties(catalog, matches, sequences) -> None:
    clicks = training_clicks(sequences, catalog)
    table = pa.table({"query": ["red"]})
    scores = PopularQueryFilterRanker(clicks, matches).score(table)[0]
    by_id = dict(zip(catalog.item_ids, scores, strict=True))
    assert by_id["b"] > by_id["a"] > by_id["e"] == by_id["g"] > by_id["c"] == by_id["h"]


def test_the_random_order_is_the_requests_own(catalog, matches, requests_table) -> None:
    table = requests_table([("mug", []), ("mug", []), ("mug", ["a"]), (None, [])])
    ranker = QueryFilterRanker(catalog, matches, seed=3)
    scores = ranker.score(table)
    again = np.concatenate([ranker.score(table.slice(row, 1)) for row in range(4)])
    assert (scores == again).all()
    assert len({tuple(row) for row in scores.tolist()}) == 4
    assert not np.array_equal(scores, QueryFilterRanker(catalog, matches, seed=4).score(table))


def test_the_random_order_moves_with_the_items(catalog, shuffled, matches, requests_table) -> None:
    other, order = shuffled
    table = requests_table([("blue", []), (None, ["c"])])
    moved = QueryFilterRanker(other, QueryMatches(other)).score(table)
    assert (moved == QueryFilterRanker(catalog, matches).score(table)[:, order]).all()


def test_the_random_order_is_uniform(catalog, matches, requests_table) -> None:
    scores = QueryFilterRanker(catalog, matches).score(requests_table([(None, [])] * 4000))
    assert scores.min() >= 0 and scores.max() < 1
    best = np.bincount(scores.argmax(axis=1), minlength=8) / 4000
    np.testing.assert_allclose(best, 1 / 8, atol=0.02)
    correlation = np.corrcoef(scores, rowvar=False) - np.eye(8)
    assert abs(correlation).max() < 0.07


def test_a_match_lifts_and_keeps_the_order() -> None:
    values = np.array([0.5, -2.0, 0.5, 9.0])
    lifted = behind_match(values, np.array([1, 2]))
    assert lifted.tolist() == [1.0, 4.0, 5.0, 2.0]

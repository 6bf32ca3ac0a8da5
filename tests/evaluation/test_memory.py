"""Rankers are measured in memory for a few arrays of a block, whatever their number of examples."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from karma_ray.baselines.affinity import AffinityRanker
from karma_ray.baselines.bm25 import Bm25Ranker
from karma_ray.baselines.popularity import PopularityRanker
from karma_ray.baselines.query_filter import PopularQueryFilterRanker, QueryFilterRanker
from karma_ray.baselines.ranker import Ranker
from karma_ray.baselines.tfidf import TfidfRanker
from karma_ray.data.catalog import Catalog
from karma_ray.data.prepared import QueryMatches
from karma_ray.data.schema import EXAMPLES
from karma_ray.evaluation import measurement
from karma_ray.evaluation.config import EvaluationConfig
from karma_ray.evaluation.evaluate import EvaluationResult, evaluate

NUM_ITEMS, NUM_EXAMPLES = 20_000, 300
MAX_SCORES = 2**18  # 13 examples at once
FLOORS = ("popularity", "query_filter", "query_filter_popular", "tfidf", "bm25", "affinity")


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    random = np.random.default_rng(0)
    words = [f"w{number}" for number in range(500)]
    titles = [" ".join(some) for some in random.choice(words, (NUM_ITEMS, 3))]
    brands = [f"b{number}" for number in random.integers(0, 30, NUM_ITEMS)]
    ids = [f"i{number}" for number in range(NUM_ITEMS)]
    none = pa.nulls(NUM_ITEMS, pa.string())
    columns = {"item_id": ids, "title": titles, "text": none, "brand": brands, "category": none}
    return Catalog(pa.table(columns))


@pytest.fixture(scope="module")
def examples() -> pa.Table:
    random = np.random.default_rng(1)
    rows = [
        {
            "user_id": f"u{number % 40}",
            "query": f"w{number}" if number % 3 else None,
            "page_id": f"p{number}",
            "page_positive_ids": [f"i{shown[0]}"],
            "history_item_ids": [f"i{item}" for item in shown[4:]],
            "positive_item_id": f"i{shown[0]}",
            "hard_negative_ids": [f"i{item}" for item in shown[1:4]],
        }
        for number, shown in enumerate(random.integers(0, NUM_ITEMS, (NUM_EXAMPLES, 9)))
    ]
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


def _ranker(name: str, catalog: Catalog) -> Ranker:
    clicks = np.random.default_rng(2).poisson(0.3, NUM_ITEMS)
    matches = QueryMatches(catalog)
    rankers: dict[str, Ranker] = {
        "popularity": PopularityRanker(clicks),
        "query_filter": QueryFilterRanker(catalog, matches),
        "query_filter_popular": PopularQueryFilterRanker(clicks, matches),
        "tfidf": TfidfRanker(catalog),
        "bm25": Bm25Ranker(catalog),
        "affinity": AffinityRanker(catalog, matches, clicks),
    }
    return rankers[name]


def _measured(ranker: Ranker, catalog: Catalog, examples: pa.Table) -> EvaluationResult:
    return evaluate(
        ranker, examples, catalog, config=EvaluationConfig(),
        train_item_ids=np.ones(NUM_ITEMS, bool), query_matches=QueryMatches(catalog),
    )  # fmt: skip


@pytest.mark.parametrize("name", FLOORS)
def test_floors_need_memory_for_a_block_and_measure_the_same(
    name: str, catalog: Catalog, examples: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = _ranker(name, catalog)
    whole = _measured(ranker, catalog, examples)
    monkeypatch.setattr(measurement, "MAX_SCORES", MAX_SCORES)
    tracemalloc.start()
    try:
        found = _measured(ranker, catalog, examples)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.metrics == whole.metrics
    np.testing.assert_array_equal(found.details.ranks, whole.details.ranks)
    # A block has 1 MiB of scores, and all examples would have 23.
    assert peak < 14 * 2**20


def test_a_catalogue_larger_than_the_limit_is_scored_example_by_example() -> None:
    at_once = measurement._rows_at_once
    assert at_once(256, 100_000) == 256
    assert at_once(256, 10**6) == 134
    assert at_once(256, 10**9) == 1

"""The recall stage: exact and approximate lists, the union, category match."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from karma_ray.data.catalog import Catalog
from karma_ray.data.prepared import PreparedData
from karma_ray.funnel.matching import CHANNELS, Matching, joined
from karma_ray.funnel.recall import Categories, others_recall, run_recall
from karma_ray.funnel.requests import Clicks
from karma_ray.funnel.sizes import Sizes
from karma_ray.metrics.ranking import pessimistic_ranks
from karma_ray.retrieval.retriever import Retriever

K = 6


@pytest.fixture(scope="module")
def ground(
    source: PreparedData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Matching, Clicks, Clicks]:
    catalog = source.catalog()
    sizes = Sizes(recalled=K, pool=20, kept=5)
    valid, test = (Clicks.read(source, catalog, split, 100) for split in ("valid", "test"))
    folder = str(tmp_path_factory.mktemp("matching"))
    return Matching(source, catalog, sizes, folder), valid, test


def test_rates_are_those_of_brute_force(
    ground: tuple[Matching, Clicks, Clicks], runs: Path, source: PreparedData
) -> None:
    matching, valid, test = ground
    retriever = Retriever.load(str(runs / "karma-1"), source.items_uri)
    sums, facts = run_recall(retriever, matching, valid, test, Categories(source.catalog()))
    scores = retriever.score(test.examples)
    hits = pessimistic_ranks(scores, test.targets) <= K
    assert sums.mean("exact") == pytest.approx(100 * hits.mean())
    own = np.stack([np.lexsort((matching.priority, -one))[:K] for one in scores])
    union = joined(own, matching.block(test, slice(0, len(test.targets))), K)
    inside = (union == test.targets[:, None]).any(axis=1)
    assert sums.mean("union") == pytest.approx(100 * inside.mean())
    codes = np.array(source.catalog().column("category"))
    match = (codes[own] == codes[test.targets][:, None]).mean()
    assert sums.mean("category_match") == pytest.approx(100 * match)
    # So few items have one cell, and all of it is searched.
    assert facts["kind"] == "ivf" and sums.mean("ann_overlap") == 100.0
    ann = sums.mean("ann")
    assert ann is not None and ann >= 100 * hits.mean()  # where ties count against the target


def test_channels_alone_and_their_union(ground: tuple[Matching, Clicks, Clicks]) -> None:
    matching, _, test = ground
    sums = others_recall(matching, test, Categories(Catalog(_items(test.num_items, None))))
    matched = matching.block(test, slice(0, len(test.targets)))
    for number, name in enumerate(CHANNELS):
        assert sums.mean(name) == pytest.approx(100 * (matched.ranks[:, number] <= K).mean())
    inside = (matched.rows[:, :K] == test.targets[:, None]).any(axis=1).mean()
    assert sums.mean("union") == pytest.approx(100 * inside)
    assert not any(name.endswith("category_match") for name in sums.sums)  # there are none


def test_category_match_by_hand_and_only_for_items_with_a_category() -> None:
    names = ["home > red", "x > Red", "blue", None, "blue"]
    categories = Categories(Catalog(_items(5, names)))
    lists = np.array([[0, 1, 2, -1], [2, 3, 4, 0]])
    assert categories.match(lists, np.array([0, 2])).tolist() == [2 / 3, 0.5]
    assert categories.measured(np.array([0, 3, -1])).tolist() == [1.0, 0.0, 0.0]


def _items(count: int, categories: list[str | None] | None) -> pa.Table:
    ids = [f"i{number}" for number in range(count)]
    return pa.table(
        {
            "item_id": ids, "title": ids,
            "text": pa.nulls(count, pa.string()), "brand": pa.nulls(count, pa.string()),
            "category": pa.array(categories or [None] * count, pa.string()),
        }
    )  # fmt: skip

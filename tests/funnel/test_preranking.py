"""The weight of the fusion is chosen on validation alone, and is never worse there than none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from karma_ray.data.prepared import PreparedData
from karma_ray.funnel.fusion import GRID
from karma_ray.funnel.matching import Matching
from karma_ray.funnel.preranking import PreRanker, chosen_blend, others_prerank, run_prerank
from karma_ray.funnel.requests import Clicks
from karma_ray.funnel.sizes import Sizes
from karma_ray.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def ground(
    source: PreparedData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Matching, Clicks, Clicks]:
    catalog = source.catalog()
    sizes = Sizes(recalled=6, pool=20, kept=5)
    folder = str(tmp_path_factory.mktemp("matching"))
    valid, test = (Clicks.read(source, catalog, split, 100) for split in ("valid", "test"))
    return Matching(source, catalog, sizes, folder), valid, test


@pytest.fixture(scope="module")
def retriever(runs: Path, source: PreparedData) -> Retriever:
    return Retriever.load(str(runs / "karma-1"), source.items_uri)


def test_other_test_clicks_do_not_change_the_weight(
    ground: tuple[Matching, Clicks, Clicks], retriever: Retriever
) -> None:
    matching, valid, test = ground
    pre, _ = chosen_blend(matching, valid)
    sums, facts = run_prerank(retriever, pre, valid, test)
    moved = replace(test, targets=np.roll(test.targets, 7))
    other, same = run_prerank(retriever, pre, valid, moved)
    assert same == facts
    assert other.mean("kept") != sums.mean("kept")


def test_on_validation_the_fusion_is_never_worse_than_without(
    ground: tuple[Matching, Clicks, Clicks], retriever: Retriever
) -> None:
    matching, valid, test = ground
    pre, rates = chosen_blend(matching, valid)
    assert rates[GRID.index(pre.weight)] == max(rates)
    _, facts = run_prerank(retriever, pre, valid, test)
    rates = facts["valid_rates"]
    assert rates[GRID.index(facts["w"])] == max(rates) >= rates[0]
    # w = 0 is the pre-ranker without KARMA, on the same clicks.
    assert rates[0] == pytest.approx(others_prerank(pre, valid).mean("kept"))


def test_a_click_outside_the_candidates_is_lost_under_every_score(
    ground: tuple[Matching, Clicks, Clicks], retriever: Retriever
) -> None:
    matching, valid, test = ground
    pre = PreRanker(matching, 0.5)
    pool = others_prerank(pre, test).mean("pool")
    sums, _ = run_prerank(retriever, pre, valid, test)
    assert pool is not None and sums.mean("pool") == pool
    kept = sums.mean("kept")
    assert kept is not None and kept <= pool < 100


def test_other_clicks_of_the_same_user_and_query_count_in_all_scenes(
    ground: tuple[Matching, Clicks, Clicks],
) -> None:
    _, _, test = ground
    users, queries = (test.examples.column(name).to_pylist() for name in ("user_id", "query"))
    for number, target in enumerate(test.targets):
        mine = test.scene_items[test.scene == number]
        assert target in mine and len(set(mine)) == len(mine)
        same = [
            int(row)
            for at, row in enumerate(test.targets)
            if (users[at], queries[at]) == (users[number], queries[number])
        ]
        assert set(same) <= set(mine.tolist())

"""Ranks, their averages and gAUC: definitions, ties, references."""

from __future__ import annotations

import numpy as np
import pytest

from karma_ray.metrics import ranking


def test_the_best_score_has_rank_one() -> None:
    scores = np.array([[0.1, 0.9, 0.3], [5.0, 4.0, 3.0]])
    assert ranking.pessimistic_ranks(scores, np.array([1, 2])).tolist() == [1, 3]


def test_ties_count_against_the_target() -> None:
    scores = np.zeros((1, 12), dtype=np.float32)
    ranks = ranking.pessimistic_ranks(scores, np.array([3]))
    assert ranks.tolist() == [12]
    assert ranking.hit(ranks, 10).tolist() == [0.0]


def test_nan_scores_never_help() -> None:
    scores = np.array([[np.nan, 2.0, 1.0], [np.nan, 2.0, 1.0]])
    assert ranking.pessimistic_ranks(scores, np.array([0, 1])).tolist() == [3, 2]


def test_an_unknown_target_misses_every_cutoff() -> None:
    ranks = ranking.pessimistic_ranks(np.array([[1.0, 2.0]]), np.array([-1]))
    assert ranks[0] == ranking.MISS
    values = [ranking.hit(ranks, 1000), ranking.ndcg(ranks), ranking.reciprocal_rank(ranks)]
    assert [value.tolist() for value in values] == [[0.0], [0.0], [0.0]]


def test_rank_metrics_have_their_closed_forms() -> None:
    ranks = np.array([1, 3, 10, 11])
    assert ranking.hit(ranks, 10).tolist() == [1, 1, 1, 0]
    np.testing.assert_allclose(ranking.ndcg(ranks), [1.0, 0.5, 1 / np.log2(11), 0.0])
    np.testing.assert_allclose(ranking.reciprocal_rank(ranks), [1, 1 / 3, 0.1, 1 / 11])


def test_the_rank_within_all_rows_is_the_rank() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 5, size=(20, 30)).astype(np.float32)
    targets = generator.integers(0, 30, size=20)
    ranks = ranking.pessimistic_ranks(scores, targets)
    every_row = np.arange(30)
    within = [
        ranking.rank_within(s, int(t), every_row) for s, t in zip(scores, targets, strict=True)
    ]
    assert within == ranks.tolist()


def test_top_rows_hold_the_target_exactly_when_its_rank_does() -> None:
    generator = np.random.default_rng(1)
    scores = generator.integers(0, 4, size=(50, 20)).astype(np.float32)
    targets = generator.integers(0, 20, size=50)
    ranks = ranking.pessimistic_ranks(scores, targets)
    for k in (1, 5, 19, 20, 40):
        top = ranking.top_rows(scores, k, targets, np.arange(20))
        assert top.shape == (50, min(k, 20))
        assert ((top == targets[:, None]).any(axis=1) == (ranks <= k)).all()


def test_top_rows_are_the_sorted_head() -> None:
    generator = np.random.default_rng(2)
    scores = generator.normal(size=(8, 40))
    top = ranking.top_rows(scores, 7, np.full(8, -1), np.arange(40))
    assert (top == np.argsort(-scores, axis=1)[:, :7]).all()


def test_tied_items_go_by_priority_whatever_their_column() -> None:
    scores, priority = np.zeros((1, 6)), np.array([5, 3, 1, 0, 2, 4])
    top = ranking.top_rows(scores, 3, np.array([3]), priority)
    assert top.tolist() == [[2, 4, 1]]  # column 3 is the target: last among its ties
    order = np.array([4, 2, 0, 5, 3, 1])
    moved = ranking.top_rows(scores, 3, np.array([-1]), priority[order])
    assert order[moved[0]].tolist() == [3, 2, 4]


def brute_force_gauc(scores, labels, groups, weight):
    total = mass = 0.0
    for group in np.unique(groups):
        pos, neg = (scores[(groups == group) & (labels == side)] for side in (True, False))
        if len(pos) and len(neg):
            auc = np.mean([(p > n) + 0.5 * (p == n) for p in pos for n in neg])
            w = {"impressions": len(pos) + len(neg), "positives": len(pos), "uniform": 1}[weight]
            total, mass = total + w * auc, mass + w
    return total / mass


@pytest.mark.parametrize("weight", ["impressions", "positives", "uniform"])
def test_gauc_equals_brute_force(weight: ranking.GroupWeight) -> None:
    generator = np.random.default_rng(3)
    scores = generator.integers(0, 6, size=400).astype(np.float32)  # many ties
    labels = generator.random(400) < 0.4
    groups = generator.integers(0, 60, size=400)
    result = ranking.group_auc(scores, labels, groups)
    value = np.average(result.auc, weights=result.weights(weight))
    assert value == pytest.approx(brute_force_gauc(scores, labels, groups, weight), abs=1e-12)


def test_groups_of_one_kind_are_left_out_and_no_group_is_no_error() -> None:
    scores, groups = np.arange(4.0), np.array([0, 0, 1, 1])
    only_clicks = ranking.group_auc(scores, np.array([True, True, False, True]), groups)
    assert only_clicks.groups.tolist() == [1]
    empty = ranking.group_auc(np.zeros(0), np.zeros(0, dtype=bool), np.zeros(0, dtype=np.int64))
    assert len(empty.auc) == len(empty.weights("uniform")) == 0


def test_constant_scores_have_an_auc_of_one_half_and_monotone_maps_change_nothing() -> None:
    generator = np.random.default_rng(4)
    labels, groups = generator.random(200) < 0.5, generator.integers(0, 20, size=200)
    assert (ranking.group_auc(np.ones(200), labels, groups).auc == 0.5).all()
    scores = generator.normal(size=200)
    plain, warped = (
        ranking.group_auc(values, labels, groups).auc for values in (scores, np.exp(3 * scores))
    )
    assert (plain == warped).all()
    assert np.allclose(ranking.group_auc(-scores, labels, groups).auc, 1 - plain)

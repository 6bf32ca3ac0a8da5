"""The parts of an AUC: their mean, and their interval beside that of a full bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from karma_ray.funnel.outcomes import UserSums, difference
from karma_ray.funnel.ranking import auc_parts, gauc_parts
from karma_ray.metrics.ranking import group_auc


def test_the_mean_of_the_parts_is_the_auc() -> None:
    scores = np.array([0.9, 0.5, 0.5, 0.2, 0.1])
    clicked = np.array([True, True, False, False, True])
    values, weights = auc_parts(scores, clicked)
    # Pairs: 0.9 beats both, 0.5 ties with one and beats one, 0.1 beats none.
    assert np.average(values, weights=weights) == pytest.approx((2 + 1.5 + 0) / 6)
    assert weights[clicked].sum() == weights[~clicked].sum() == 2.5


def test_pages_without_a_click_or_without_others_do_not_count() -> None:
    page = np.array([0, 0, 1, 1, 2, 2])
    clicked = np.array([True, False, True, True, False, True])
    pages, auc, weights = gauc_parts(np.array([0.1, 0.2, 0.3, 0.1, 0.5, 0.5]), clicked, page)
    assert (pages.tolist(), auc.tolist(), weights.tolist()) == ([0, 2], [0.0, 0.5], [2.0, 2.0])


def test_the_interval_is_that_of_a_full_bootstrap_over_users() -> None:
    draw = np.random.default_rng(0)
    user = draw.integers(0, 150, 3000)
    clicked = draw.random(3000) < 0.2 + 0.2 * draw.random(150)[user]
    left = draw.normal(size=3000) + clicked + 0.5 * draw.normal(size=150)[user]
    right = draw.normal(size=3000) + 0.8 * clicked
    names = [str(one) for one in user]
    sums = []
    for scores in (left, right):
        values, weights = auc_parts(scores, clicked)
        sums.append(UserSums.of(names, {"AUC": values}, {"AUC": weights}))
    found = difference([(sums[0], sums[1])], "AUC")
    assert found is not None and found.bootstrap is not None

    def auc(scores: np.ndarray, rows: np.ndarray) -> float:
        zeros = np.zeros(len(rows), np.int64)
        return 100 * float(group_auc(scores[rows], clicked[rows], zeros).auc[0])

    everything = np.arange(3000)
    assert found.mean == pytest.approx(auc(left, everything) - auc(right, everything))
    rows_of = [np.flatnonzero(user == one) for one in range(150)]
    draws = []
    for _ in range(400):
        rows = np.concatenate([rows_of[one] for one in draw.integers(0, 150, 150)])
        draws.append(auc(left, rows) - auc(right, rows))
    low, high = np.quantile(draws, [0.025, 0.975])
    width = found.bootstrap.high - found.bootstrap.low
    assert width == pytest.approx(high - low, rel=0.15)
    assert found.bootstrap.low == pytest.approx(low, abs=0.2 * width)

"""AUC, its interval over users, and calibration against brute force and closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from karma_ray.metrics.clicks import Reliability, auc, auc_difference, log_loss


def drawn(seed: int, size: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with ties, clicks that they predict, and users."""
    random = np.random.default_rng(seed)
    scores = random.integers(0, 12, size) / 12
    return scores, random.random(size) < 0.1 + 0.6 * scores, random.integers(0, 40, size)


def test_auc_counts_pairs() -> None:
    scores, clicked, _ = drawn(0)
    pairs = scores[clicked][:, None] - scores[~clicked]
    assert auc(scores, clicked) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert np.isnan(auc(scores, np.zeros(len(scores), bool)))


def test_the_interval_holds_the_auc_and_a_ranker_does_not_differ_from_itself() -> None:
    scores, clicked, user = drawn(1)
    found = auc_difference(scores, None, clicked, user, seed=0)
    assert found.low < found.difference < found.high
    assert found.difference == pytest.approx(auc(scores, clicked))
    same = auc_difference(scores, scores, clicked, user, seed=0)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_a_better_ranker_differs_and_a_resample_is_the_auc_of_repeated_users() -> None:
    scores, clicked, user = drawn(2, size=3000)
    noise = np.random.default_rng(0).random(3000)
    assert auc_difference(scores, noise, clicked, user, seed=0).low > 0
    whole = auc_difference(scores, None, clicked, np.zeros(3000, np.int64), seed=0)
    assert whole.low == pytest.approx(whole.high) == pytest.approx(auc(scores, clicked))


def test_rates_that_are_right_have_no_calibration_error() -> None:
    chance = np.repeat([0.1, 0.5], 1000)
    clicked = np.concatenate([np.arange(1000) < 100, np.arange(1000) < 500])
    curve = Reliability.of(chance, clicked)
    assert curve.error == pytest.approx(0, abs=1e-12)
    assert curve.predicted.tolist() == pytest.approx([0.1, 0.5])
    assert curve.count.tolist() == [1000, 1000]
    assert Reliability.of(chance + 0.2, clicked).error == pytest.approx(0.2)


def test_the_log_loss_of_a_sure_mistake_is_finite() -> None:
    values = log_loss(np.array([0.0, 0.25, 1.0]), np.array([True, True, True]))
    assert values.tolist() == pytest.approx([-np.log(1e-7), np.log(4), 0], abs=1e-6)

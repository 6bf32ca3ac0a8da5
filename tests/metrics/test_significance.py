"""The paired bootstrap over users."""

from __future__ import annotations

import numpy as np
import pytest

from karma_ray.metrics.significance import paired_bootstrap


def test_equal_rankers_differ_by_nothing() -> None:
    values = np.arange(20.0)
    result = paired_bootstrap(values, values, [str(n % 5) for n in range(20)], seed=0)
    assert (result.difference, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert result.num_users == 5


def test_a_clear_difference_is_found_and_swapping_sides_mirrors_it() -> None:
    generator = np.random.default_rng(0)
    right = generator.normal(size=300)
    left = right + 0.5 + 0.1 * generator.normal(size=300)
    users = [f"u{n % 60}" for n in range(300)]
    result = paired_bootstrap(left, right, users, seed=1)
    assert 0 < result.low < result.difference < result.high and result.p_value < 0.01
    mirrored = paired_bootstrap(right, left, users, seed=1)
    assert mirrored.difference == pytest.approx(-result.difference)
    assert (mirrored.low, mirrored.high) == pytest.approx((-result.high, -result.low))


def test_the_interval_matches_the_normal_theory() -> None:
    generator = np.random.default_rng(2)
    left, users = generator.normal(size=2000), [str(n) for n in range(2000)]
    result = paired_bootstrap(left, np.zeros(2000), users, seed=3)
    half = 1.96 * left.std() / np.sqrt(2000)
    assert (result.high - result.low) / 2 == pytest.approx(half, rel=0.1)


def test_clicks_of_one_user_are_no_independent_evidence() -> None:
    generator = np.random.default_rng(4)
    per_user = generator.normal(size=30)
    once = paired_bootstrap(per_user, np.zeros(30), [str(n) for n in range(30)], seed=5)
    users = [str(n % 30) for n in range(300)]
    tenfold = paired_bootstrap(np.tile(per_user, 10), np.zeros(300), users, seed=5)
    assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high))


def test_weights_weigh_and_the_seed_decides() -> None:
    left, right = np.array([1.0, 0.0, 0.0]), np.zeros(3)
    weights = np.array([3.0, 1.0, 1.0])
    first = paired_bootstrap(left, right, ["a", "b", "c"], seed=0, weights=weights)
    assert first.difference == pytest.approx(0.6)
    assert first == paired_bootstrap(left, right, ["a", "b", "c"], seed=0, weights=weights)

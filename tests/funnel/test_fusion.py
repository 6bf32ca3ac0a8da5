"""Fusion by hand: z per request, zero variance, ranks among candidates, the choice of w."""

from __future__ import annotations

import numpy as np

from karma_ray.funnel.fusion import (
    GRID,
    OUTSIDE,
    best_weight,
    fused,
    places,
    ranks,
    standardised,
)


def test_z_is_taken_within_a_request() -> None:
    z = standardised(np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]))
    expected = np.sqrt(1.5) * np.array([-1.0, 0.0, 1.0])
    np.testing.assert_allclose(z, [expected, expected])


def test_equal_scores_say_nothing() -> None:
    """Their deviation is 0 (or what rounding left of it), and so is z: the other score decides."""
    equal = standardised(np.array([[0.1 + 0.2, 0.3, 0.3], [7.0, 7.0, 7.0], [0.0, 0.0, 0.0]]))
    assert not equal.any()
    other = standardised(np.array([[3.0, 1.0, 2.0]] * 3))
    for weight in (0.05, 0.5, 0.95):
        assert (np.argsort(-fused(equal, other, weight)) == [0, 2, 1]).all()


def test_the_fusion_by_hand() -> None:
    left, right = np.array([[-1.0, 0.0, 1.0]]), np.array([[1.0, 1.0, -2.0]])
    np.testing.assert_allclose(fused(left, right, 0.25), [[-0.5, 0.25, 0.25]])
    np.testing.assert_array_equal(fused(left, right, 0.0), left)
    np.testing.assert_array_equal(fused(left, right, 1.0), right)


def test_the_grid_has_the_weights_of_the_method() -> None:
    assert (GRID[0], GRID[1], GRID[-1], len(GRID)) == (0.0, 0.05, 1.0, 21)


def test_of_equal_weights_the_smallest_is_chosen() -> None:
    assert best_weight(np.array([0.2, 0.5, 0.5]), (0.0, 0.5, 1.0)) == 0.5
    assert best_weight(np.ones(21)) == 0.0


def test_ranks_among_candidates_count_ties_against_the_item() -> None:
    pool = np.array([[7, 3, 5], [2, 9, 4]])
    request, row = np.array([0, 0, 1, 1]), np.array([3, 8, 4, 2])
    place = places(pool, request, row)
    assert place.tolist() == [1, -1, 2, 0]
    scores = np.array([[0.5, 0.5, 0.1], [0.3, 0.2, 0.9]])
    assert ranks(scores, request, place).tolist() == [2, OUTSIDE, 1, 2]

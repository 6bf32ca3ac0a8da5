"""Similarity features by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from karma_ray.ranking.features import TierWeights, num_features, similarity_features
from karma_ray.retrieval.similarity import Similarity

COSINES = np.array([[-1.0, -0.85, 0.05, 0.1, 0.95, 1.0, 0.5]], np.float32)


def test_tiers_and_summaries_by_hand() -> None:
    found = Similarity.of(COSINES)
    assert found.counts.tolist() == [[2, 0, 0, 0, 0, 2, 0, 1, 0, 2]]
    assert found.max[0] == 1
    assert found.mean[0] == pytest.approx(0.75 / 7, rel=1e-5)
    assert found.top5[0] == pytest.approx((1 + 0.95 + 0.5 + 0.1 + 0.05) / 5)


def test_places_without_an_item_do_not_count() -> None:
    there = np.array([[False, False, True, True, True, True, True]])
    masked, short = Similarity.of(COSINES, there), Similarity.of(COSINES[:, 2:])
    for name in ("max", "mean", "top5", "counts"):
        np.testing.assert_allclose(getattr(masked, name), getattr(short, name), rtol=1e-6)


def test_an_empty_history_has_features_of_zero() -> None:
    none = similarity_features(COSINES, np.zeros(COSINES.shape, bool))
    assert none.shape == (1, num_features(False)) and not none.any()
    assert not similarity_features(COSINES[:, :0], np.zeros((1, 0), bool)).any()


def test_a_tier_is_its_log_count_times_a_learned_number() -> None:
    features = torch.from_numpy(
        similarity_features(COSINES, np.ones(COSINES.shape, bool), np.array([3.0], np.float32))
    )
    weights = TierWeights(interest=True)
    with torch.no_grad():
        weights.tiers.copy_(torch.arange(10.0))
    result = weights(features)[0]
    assert result[:10].tolist() == pytest.approx(
        [0, 0, 0, 0, 0, 5 * np.log(3), 0, 7 * np.log(2), 0, 9 * np.log(3)], rel=1e-5
    )
    assert result[10:].tolist() == features[0, 10:].tolist() and result[-1] == 3

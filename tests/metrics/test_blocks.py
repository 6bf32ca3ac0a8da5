"""Scores on a device give the metrics that scores in memory give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from karma_ray.metrics.blocks import ArrayScores, TensorScores


@pytest.mark.parametrize("levels", [1, 2, 7, 10_000])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_a_device_finds_the_ranks_and_top_lists_of_the_memory(levels: int, k: int) -> None:
    draw = np.random.default_rng(levels)
    values = draw.integers(0, levels, (12, 33)).astype(np.float32)
    values[draw.random(values.shape) < 0.2] = -np.inf
    targets = draw.integers(-1, 33, 12)
    priority = draw.permutation(33)
    left_out = draw.random(33) < 0.3
    here, there = ArrayScores(values), TensorScores(torch.from_numpy(values.copy()))
    blocks = [(here, there), (here.without(left_out, targets), there.without(left_out, targets))]
    for mine, theirs in blocks:
        assert mine.shape == theirs.shape and not mine.has_nan() and not theirs.has_nan()
        ranks = [block.pessimistic_ranks(targets) for block in (mine, theirs)]
        assert np.array_equal(*ranks)
        tops = [block.top_rows(k, targets, priority) for block in (mine, theirs)]
        assert tops[0].shape == (12, min(k, 33)) and np.array_equal(*tops)
    known = np.flatnonzero(targets >= 0)
    rows = [np.unique(np.append(draw.integers(0, 33, 9), targets[r])) for r in known]
    within = [block.ranks_within(known, targets[known], rows) for block in (here, there)]
    assert len(within[0]) == len(known) and np.array_equal(*within)
    columns = draw.integers(0, 33, 12)
    assert np.array_equal(here.at(np.arange(12), columns), there.at(np.arange(12), columns))


def test_no_request_with_matching_items_is_no_error_and_nan_is_seen() -> None:
    values = np.array([[0.5, np.nan]], np.float32)
    none = np.zeros(0, dtype=np.int64)
    for block in (ArrayScores(values), TensorScores(torch.from_numpy(values))):
        assert block.has_nan() and len(block.ranks_within(none, none, [])) == 0

"""Both kinds on the same embeddings."""

from __future__ import annotations

import numpy as np

from karma_ray.codes.comparison import compare, floor_of, table_of
from karma_ray.codes.config import KINDS, CodesConfig


def test_kinds_have_the_same_codes_but_for_the_last_level() -> None:
    vectors = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    config = CodesConfig(codewords=8, fsq_levels=(4, 4), iterations=5)
    found = compare(vectors, config, num_seeds=2)
    assert list(found) == list(KINDS) and all(len(some) == 2 for some in found.values())
    ours, rival = (some[0] for some in found.values())
    assert ours.errors[:2] == rival.errors[:2] and ours.errors[2] != rival.errors[2]
    lines = table_of(found, config.sizes).splitlines()
    assert len(lines) == 1 + 3 + 3 * len(config.sizes)
    assert lines[1].startswith("collision rate") and lines[1].count("±") == 2


def test_collisions_that_no_codes_avoid_are_told() -> None:
    vectors = np.ones((4, 2), np.float32)
    vectors[0] = 0
    assert floor_of(vectors).startswith("75.00% of the items")

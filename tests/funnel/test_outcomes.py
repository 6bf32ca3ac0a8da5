"""Sums per user: means, the stored table, differences over users and seeds."""

from __future__ import annotations

import numpy as np
import pytest

from karma_ray.funnel.outcomes import UserSums, difference, flat, mean_of

USERS = ["b", "a", "b", "c"]


def sums(*values: float, weight: list[float] | None = None) -> UserSums:
    weights = {"HR": np.array(weight)} if weight else None
    return UserSums.of(USERS, {"HR": np.array(values)}, weights)


def test_a_mean_is_over_clicks_in_percent() -> None:
    assert sums(1.0, 0.0, 1.0, 0.0).mean("HR") == 50.0
    assert sums(1.0, 0.0, 1.0, 0.0, weight=[1, 0, 1, 2]).mean("HR") == 50.0
    assert sums(1.0, 0.0, 1.0, 0.0).mean("other") is None


def test_the_stored_table_is_the_same() -> None:
    before = sums(1.0, 0.5, 1.0, 0.0, weight=[1, 2, 1, 1])
    after = UserSums.read(before.table())
    assert after.users == before.users == ("a", "b", "c")
    for mine, theirs in zip(after.sums["HR"], before.sums["HR"], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_difference_of_means_with_its_interval() -> None:
    found = difference([(sums(1.0, 0.0, 1.0, 0.0), sums(0.0, 0.0, 1.0, 0.0))], "HR")
    assert found is not None and found.mean == 25.0 and found.seeds == (25.0,)
    told = flat("recall/delta_none", found)
    assert told["recall/delta_none"] == 25.0
    assert told["recall/delta_none.low"] <= 25.0 <= told["recall/delta_none.high"]
    assert told["recall/delta_none.users_low"] == 0.0  # a draw without user b shows nothing


def test_seeds_that_disagree_widen_the_interval_over_seeds_alone() -> None:
    base, gain, loss = sums(0, 0, 1, 0), sums(1, 0, 1, 0), sums(0, 0, 0, 0)
    agree = difference([(gain, base), (gain, base)], "HR")
    differ = difference([(gain, base), (loss, base)], "HR")
    assert agree is not None and differ is not None and differ.mean == 0.0
    assert agree.seeds == (25.0, 25.0) and differ.seeds == (25.0, -25.0)
    told, apart = flat("d", agree), flat("d", differ)
    assert told["d.low"] == pytest.approx(
        told["d"] - (told["d.users_high"] - told["d.users_low"]) / 2
    )
    assert apart["d.low"] < -100 < 100 < apart["d.high"]  # two seeds, Student's t


def test_another_metric_may_be_the_baseline() -> None:
    both = UserSums.of(USERS, {"with": np.ones(4), "without": np.zeros(4)})
    found = difference([(both, both)], "with", "without")
    assert found is not None and found.mean == 100.0
    assert difference([(both, both)], "with", "nothing") is None


def test_a_mean_over_seeds_needs_every_seed() -> None:
    assert mean_of([sums(1, 1, 1, 1), sums(0, 0, 0, 0)], "HR") == 50.0
    assert mean_of([sums(1, 1, 1, 1), UserSums(("a",), {})], "HR") is None

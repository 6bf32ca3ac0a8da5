"""Differences with known numbers: mean, spread, interval, and what is compared with what."""

from __future__ import annotations

from pathlib import Path

import pytest

from karma_ray.report.comparison import (
    Group,
    at_seconds,
    common_seconds,
    difference,
    grouped,
    late_gain,
)
from karma_ray.report.paper import TABLES
from karma_ray.report.results import read_records
from tests.report.study_records import NUM_CLICKS, outcomes, write_record

TABLE = TABLES["table1"]


def groups(results: Path, table: str = "table1") -> list[Group]:
    return grouped(read_records(results), results, TABLES[table])


@pytest.fixture
def study(tmp_path: Path) -> Group:
    for seed in (0, 1, 2):
        write_record(tmp_path, "action_only", seed, outcomes(2))
        # one click of five more, less in as many users as the seed says
        write_record(tmp_path, "karma_text", seed, outcomes(3, shift=seed))
        write_record(tmp_path, "null_detached", seed, outcomes(2, shift=0))
    (group,) = groups(tmp_path)
    return group


def test_a_difference_is_the_mean_over_seeds_with_its_spread(study: Group) -> None:
    karma = study.find("karma_text")
    assert karma is not None and study.baseline is not None
    found = difference(karma, study.baseline, "HR@50")
    assert found is not None
    # 20 points, and 60 / 40 points less for every user who has lost three hits
    assert found.seeds == pytest.approx((20.0, 18.5, 17.0))
    assert found.mean == pytest.approx(18.5) and found.spread == pytest.approx(1.5)


def test_the_interval_is_over_users_with_the_seeds_pooled(study: Group) -> None:
    karma = study.find("karma_text")
    assert karma is not None and study.baseline is not None
    found = difference(karma, study.baseline, "HR@50")
    assert found is not None and found.bootstrap is not None
    boot = found.bootstrap
    assert boot.num_users == 40 and boot.difference == pytest.approx(18.5)
    # 38 users gain 20 points in every seed, one loses 40 in one of the three, one in two: the
    # standard error of their mean is sqrt(var / 40)
    gains = [20.0] * 38 + [0.0, -20.0]
    mean = sum(gains) / 40
    error = (sum((g - mean) ** 2 for g in gains) / 40 / 40) ** 0.5
    assert boot.low == pytest.approx(mean - 1.96 * error, abs=0.7)
    assert boot.high == pytest.approx(mean + 1.96 * error, abs=0.7)
    assert found.direction == 1
    expected = 2.802 * (((boot.high - boot.low) / 3.92) ** 2 + 1.5**2 / 3) ** 0.5
    assert found.detectable == pytest.approx(expected, rel=1e-3)


def test_no_difference_has_no_direction(study: Group) -> None:
    null = study.find("null_detached")
    assert null is not None and study.baseline is not None
    found = difference(null, study.baseline, "HR@50")
    assert found is not None and found.mean == 0.0 and found.direction == 0
    assert found.is_saturated


def test_seeds_that_disagree_in_sign_show_nothing(tmp_path: Path) -> None:
    for seed, hits in ((0, 4), (1, 1)):
        write_record(tmp_path, "action_only", seed, outcomes(2))
        write_record(tmp_path, "karma_text", seed, outcomes(hits))
    (group,) = groups(tmp_path)
    karma = group.find("karma_text")
    assert karma is not None and group.baseline is not None
    found = difference(karma, group.baseline, "HR@50")
    assert found is not None and found.bootstrap is not None
    assert found.bootstrap.low > 0 and found.direction == 0


def test_only_seeds_that_both_have_are_compared(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_record(tmp_path, "action_only", seed, outcomes(2))
    for seed in (1, 2):
        write_record(tmp_path, "karma_text", seed, outcomes(3))
    (group,) = groups(tmp_path)
    karma = group.find("karma_text")
    assert karma is not None and group.baseline is not None
    found = difference(karma, group.baseline, "HR@10")
    assert found is not None and len(found.seeds) == 1
    assert found.bootstrap is not None and found.spread is None


def test_records_without_values_per_example_have_no_interval(tmp_path: Path) -> None:
    write_record(tmp_path, "action_only", 0, outcomes(2), outcomes="gone.npz")
    write_record(tmp_path, "karma_text", 0, outcomes(3))
    (group,) = groups(tmp_path)
    karma = group.find("karma_text")
    assert karma is not None and group.baseline is not None
    found = difference(karma, group.baseline, "HR@50")
    assert found is not None and found.mean == pytest.approx(20.0)
    assert found.bootstrap is None and found.direction == 0 and found.detectable is None


def test_every_condition_has_its_own_baseline(tmp_path: Path) -> None:
    blind = "model.user_decoder.query_mode=none"
    for settings, hits in (((), 2), ((blind,), 1)):
        write_record(tmp_path, "action_only", 0, outcomes(hits), *settings)
        write_record(tmp_path, "karma_text", 0, outcomes(3), *settings)
    found = {group.condition: group for group in groups(tmp_path)}
    assert set(found) == {"", blind}
    deltas = {}
    for condition, group in found.items():
        karma = group.find("karma_text")
        assert karma is not None and group.baseline is not None
        delta = difference(karma, group.baseline, "HR@50")
        assert delta is not None
        deltas[condition] = delta.mean
    assert deltas == pytest.approx({"": 20.0, blind: 40.0})


def test_a_setting_that_the_baseline_does_not_know_makes_another_row(tmp_path: Path) -> None:
    write_record(tmp_path, "action_only", 0, outcomes(2))
    write_record(tmp_path, "karma_text", 0, outcomes(3))
    write_record(tmp_path, "karma_text", 0, outcomes(4), "objective.lambda_dec=0.3")
    (group,) = groups(tmp_path)
    assert group.condition == "" and group.baseline is not None
    assert {variant.label for variant in group.variants} == {
        "Pairwise CE, clicks alone",
        "with Tasks 1 and 2",
        "with Tasks 1 and 2, objective.lambda_dec=0.3",
    }


def test_a_study_without_its_baseline_compares_nothing(tmp_path: Path) -> None:
    write_record(tmp_path, "karma_text", 0, outcomes(3))
    (group,) = groups(tmp_path)
    assert group.baseline is None and len(group.variants) == 1


def test_the_clock_is_read_between_validations(tmp_path: Path) -> None:
    write_record(tmp_path, "action_only", 0, outcomes(2))
    slow = [
        {"step": 50, "seconds": 30.0, "HR@50": 0.0},
        {"step": 100, "seconds": 60.0, "HR@50": 90.0},
    ]
    write_record(tmp_path, "karma_text", 0, outcomes(3), curve=slow)
    (group,) = groups(tmp_path)
    karma = group.find("karma_text")
    assert karma is not None and group.baseline is not None
    assert common_seconds(group) == 40.0
    assert at_seconds(karma, "HR@50", 40.0) == pytest.approx(30.0)
    assert at_seconds(group.baseline, "HR@50", 40.0) == 30.0
    assert at_seconds(group.baseline, "HR@50", 41.0) is None
    assert late_gain(karma, "HR@50") == pytest.approx(45.0)


def test_the_small_study_is_as_large_as_it_says(study: Group) -> None:
    assert study.baseline is not None
    assert study.baseline.records[0]["metrics"]["num_test"] == NUM_CLICKS

"""Differences with known numbers: mean, spread, interval, and what is compared with what."""

from __future__ import annotations

from pathlib import Path

import pytest

from karma_ray.studies.comparison import Group, difference
from karma_ray.studies.curves import late_gain, race
from karma_ray.studies.grouping import SEARCHED, grouped
from karma_ray.studies.intervals import Intervals
from karma_ray.studies.records import read_records
from karma_ray.studies.tables import TABLES
from tests.studies.study_records import NUM_CLICKS, outcomes, write_record

TABLE = TABLES["table1"]


def groups(results: Path, table: str = "table1") -> list[Group]:
    return grouped(read_records(results), Intervals(results), TABLES[table])


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
    assert found.over_seeds == pytest.approx((18.5 - 3.726, 18.5 + 3.726), abs=1e-2)
    of_users = 2.802 * (boot.high - boot.low) / 3.92
    expected = (of_users**2 + (4.303 + 1.061) ** 2 * 1.5**2 / 3) ** 0.5
    assert found.detectable == pytest.approx(expected, rel=1e-3)


def test_no_difference_has_no_direction(study: Group) -> None:
    null = study.find("null_detached")
    assert null is not None and study.baseline is not None
    found = difference(null, study.baseline, "HR@50")
    assert found is not None and found.mean == 0.0 and found.direction == 0
    assert found.is_saturated


@pytest.mark.parametrize("hits_of", [(4, 1), (3, 5)])
def test_seeds_that_differ_too_much_show_nothing(tmp_path: Path, hits_of: tuple[int, int]) -> None:
    for seed, hits in enumerate(hits_of):
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


def test_what_is_not_trained_stands_for_every_seed(tmp_path: Path) -> None:
    write_record(tmp_path, "affinity", 0, outcomes(1))
    for seed in (1, 2):
        write_record(tmp_path, "karma_text", seed, outcomes(2 + seed))
        write_record(tmp_path, "sasrec", 0, outcomes(1))
    (group,) = groups(tmp_path, "baselines")
    affinity, sasrec = group.find("affinity"), group.find("sasrec")
    assert affinity is not None and sasrec is not None and group.baseline is not None
    found = difference(affinity, group.baseline, "HR@50")
    assert found is not None and found.seeds == pytest.approx((-40.0, -60.0))
    assert found.bootstrap is not None and found.bootstrap.difference == pytest.approx(-50.0)
    assert difference(sasrec, group.baseline, "HR@50") is None  # another seed is another run


def test_what_is_not_trained_is_beside_the_rows_of_every_condition(tmp_path: Path) -> None:
    """But not beside rows that are measured otherwise, nor twice."""
    steps, measured = "training.steps=70", "evaluation.js_mode=pooled"
    write_record(tmp_path, "affinity", 0, outcomes(1))
    write_record(tmp_path, "karma_text", 0, outcomes(2))
    write_record(tmp_path, "karma_text", 0, outcomes(3), steps)
    write_record(tmp_path, "sasrec", 0, outcomes(3))
    write_record(tmp_path, "karma_text", 0, outcomes(3), measured)
    found = {group.condition: group for group in groups(tmp_path, "baselines")}
    assert set(found) == {"", steps, measured}
    rows = {condition: [v.row.name for v in group.variants] for condition, group in found.items()}
    assert rows[""] == ["affinity", "sasrec", "karma_text"]
    assert rows[steps] == ["affinity", "karma_text"]
    assert rows[measured] == ["karma_text"]
    group = found[steps]
    affinity = group.find("affinity")
    assert affinity is not None and group.baseline is not None
    delta = difference(affinity, group.baseline, "HR@50")
    assert delta is not None and delta.mean == pytest.approx(-40.0)


def test_records_without_values_per_example_have_no_interval(tmp_path: Path) -> None:
    write_record(tmp_path, "action_only", 0, outcomes(2), outcomes="gone")
    write_record(tmp_path, "karma_text", 0, outcomes(3))
    (group,) = groups(tmp_path)
    karma = group.find("karma_text")
    assert karma is not None and group.baseline is not None
    found = difference(karma, group.baseline, "HR@50")
    assert found is not None and found.mean == pytest.approx(20.0)
    assert found.bootstrap is None and found.direction == 0 and found.detectable is None
    assert found.gone == ("action_only-seed0",)


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
    found = race(karma, group.baseline, "HR@50")
    assert found is not None and found.seconds == 40.0
    assert found.then == pytest.approx(30.0) and found.then_lead == pytest.approx(0.0)
    assert found.end == 90.0 and found.end_lead == 60.0
    assert race(karma, group.baseline, "gAUC") is None
    assert late_gain(karma, "HR@50") == pytest.approx(45.0)


def test_the_small_study_is_as_large_as_it_says(study: Group) -> None:
    assert study.baseline is not None
    assert study.baseline.records[0]["metrics"]["num_test"] == NUM_CLICKS


def test_searched_rows_are_compared_at_the_setting_that_validation_chose(tmp_path: Path) -> None:
    def record(row: str, seed: int, hits: int, valid: float, *searched: str) -> None:
        curve = [{"step": 100, "seconds": 40.0, "HR@50": valid}]
        more = {"searched": list(searched)} if searched else {}
        write_record(tmp_path, row, seed, outcomes(hits), *searched, curve=curve, set=[],
                     assignments=[], **more)  # fmt: skip

    fast, slow = "training.learning_rate=0.01", "training.learning_rate=0.003"
    record("action_only", 0, 2, 30.0)
    record("action_only", 0, 1, 40.0, fast)  # better on validation, worse on test
    record("action_only", 0, 4, 20.0, slow)
    record("karma_text", 0, 3, 50.0)
    record("karma_text", 0, 4, 49.0, fast)
    record("sasrec", 0, 1, 10.0)  # no search: not among those that had one
    record("query_filter", 0, 1, 0.0)
    plain, searched = groups(tmp_path, "baselines")
    assert SEARCHED in searched.condition and SEARCHED not in plain.condition
    found = {v.row.name: (v.searched, v.tried, v.mean("HR@50")) for v in searched.variants}
    assert found == {
        "query_filter": ("", 1, 20.0), "action_only": (fast, 3, 20.0), "karma_text": ("", 2, 60.0),
    }  # fmt: skip
    clicks = searched.find("action_only")
    assert clicks is not None and clicks.searched == fast
    assert searched.baseline is not None and searched.baseline.row.name == "karma_text"
    assert {v.mean("HR@50") for v in plain.variants if v.row.name == "action_only"} == {40.0}


def test_seeds_of_the_chosen_setting_are_pooled_though_only_the_first_chose_it(
    tmp_path: Path,
) -> None:
    for seed, valid in ((0, 40.0), (1, 5.0)):
        curve = [{"step": 100, "seconds": 40.0, "HR@50": valid}]
        fast = "training.learning_rate=0.01"
        write_record(tmp_path, "karma_text", seed, outcomes(3), fast, curve=curve, set=[],
                     assignments=[], searched=[fast])  # fmt: skip
        write_record(tmp_path, "karma_text", seed, outcomes(1))  # 30 on validation
    _, searched = groups(tmp_path, "baselines")
    (karma,) = searched.variants
    assert sorted(karma.records) == [0, 1] and karma.tried == 2 and karma.mean("HR@50") == 60.0

"""Intervals outlive the values per example that they were made from, and no others are made up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from karma_ray.artifacts import read_lines
from karma_ray.studies.comparison import Difference, Group, difference
from karma_ray.studies.grouping import grouped
from karma_ray.studies.intervals import Intervals
from karma_ray.studies.page import write_report
from karma_ray.studies.records import OUTCOMES, read_records
from karma_ray.studies.tables import TABLES
from tests.studies.study_records import outcomes, write_record


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two seeds, told once while their values per example were there."""
    folder = tmp_path / "results"
    for seed in (0, 1):
        write_record(folder, "action_only", seed, outcomes(2))
        write_record(folder, "karma_text", seed, outcomes(3, shift=1 + seed))
    write_report(folder)
    return folder


def compared(group: Group, metric: str) -> Difference:
    """KARMA over clicks alone."""
    karma = group.find("karma_text")
    assert karma is not None and group.baseline is not None
    found = difference(karma, group.baseline, metric)
    assert found is not None
    return found


def told(results: Path, label: str) -> str:
    """The sentence of a row."""
    lines = write_report(results)[0].read_text().splitlines()
    return next(line for line in lines if line.startswith(f"- {label}:"))


def test_a_report_without_values_per_example_is_the_same(results: Path) -> None:
    before = (results / "tables.md").read_text()
    shutil.rmtree(results / OUTCOMES)
    write_report(results)
    assert (results / "tables.md").read_text() == before and "+17.75" in before


def test_a_new_run_beside_an_old_one_without_values_is_said_to_lack_an_interval(
    results: Path,
) -> None:
    shutil.rmtree(results / OUTCOMES)
    write_record(results, "history_to_text", 0, outcomes(4))
    sentence = told(results, "with Task 1")
    assert "without an interval" in sentence and "HR@50 (+40.00)" in sentence
    assert "values per example of action_only-seed0 are missing" in sentence
    assert "no established difference" not in sentence
    assert "higher on" in told(results, "with Tasks 1 and 2")


def test_a_further_seed_keeps_the_interval_of_those_before_and_says_so(results: Path) -> None:
    records = grouped(read_records(results), Intervals(results), TABLES["table1"])[0]
    shutil.rmtree(results / OUTCOMES)
    for row in ("action_only", "karma_text"):
        write_record(results, row, 2, outcomes(3))
    (group,) = grouped(read_records(results), Intervals(results), TABLES["table1"])
    before, after = (compared(g, "HR@50") for g in (records, group))
    assert after.bootstrap == before.bootstrap and len(after.seeds) == len(before.seeds) + 1
    assert not before.gone and set(after.gone) == {
        f"{row}-seed{seed}" for row in ("action_only", "karma_text") for seed in (0, 1)
    }
    sentence = told(results, "with Tasks 1 and 2")
    assert "values per example of karma_text-seed0" in sentence and "seed2" not in sentence
    assert "without an interval" not in sentence


def test_seeds_whose_values_are_here_are_enough_for_an_interval(results: Path) -> None:
    shutil.rmtree(results / OUTCOMES)
    shutil.rmtree(results / "differences")
    for row, hits in (("action_only", 2), ("karma_text", 3)):
        write_record(results, row, 2, outcomes(hits))
    (group,) = grouped(read_records(results), Intervals(results), TABLES["table1"])
    found = compared(group, "HR@50")
    assert len(found.seeds) == 3 and found.bootstrap is not None and found.gone
    assert found.bootstrap.difference == pytest.approx(20.0)  # of the new seed alone


def test_what_was_kept_of_a_run_goes_with_its_record(results: Path) -> None:
    kept = str(results / "differences" / "toy.jsonl")
    before = list(read_lines(kept))
    write_record(results, "karma_text", 1, outcomes(5))
    write_report(results)
    after = list(read_lines(kept))
    assert len(before) == len(after) == 1 and before[0]["row"] != after[0]["row"]

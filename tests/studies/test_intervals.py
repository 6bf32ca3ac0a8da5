"""Intervals outlive the values per example that they were made from, and no others are made up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from karma_ray.artifacts import read_lines
from karma_ray.studies.page import write_report
from karma_ray.studies.records import OUTCOMES
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
    assert "values per example of action_only-seed0 are not here" in sentence
    assert "no difference shown" not in sentence
    assert "higher on" in told(results, "with Tasks 1 and 2")


def test_another_seed_of_a_kept_comparison_asks_for_the_values_of_all(results: Path) -> None:
    shutil.rmtree(results / OUTCOMES)
    for row in ("action_only", "karma_text"):
        write_record(results, row, 2, outcomes(3))
    sentence = told(results, "with Tasks 1 and 2")
    for row in ("action_only", "karma_text"):
        assert f"{row}-seed1" in sentence and f"{row}-seed2" not in sentence


def test_what_was_kept_of_a_run_goes_with_its_record(results: Path) -> None:
    kept = str(results / "differences" / "toy.jsonl")
    before = list(read_lines(kept))
    write_record(results, "karma_text", 1, outcomes(5))
    write_report(results)
    after = list(read_lines(kept))
    assert len(before) == len(after) == 1 and before[0]["row"] != after[0]["row"]

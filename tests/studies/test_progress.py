"""What jobs/status.py says of searches and studies."""

from __future__ import annotations

from pathlib import Path

import pytest

from karma_ray.artifacts import write_json
from karma_ray.errors import InputError
from karma_ray.studies.ledger import Ledger, facts_of
from karma_ray.studies.progress import note_study, told_progress
from tests.studies.searches import DRAWN, METRIC, made, search
from tests.studies.study_records import outcomes, write_record

NO_HOURS = "Machine hours: none noted."


def test_a_search_says_how_many_trials_are_done_and_waiting_and_the_best(tmp_path: Path) -> None:
    out, found = str(tmp_path), search()
    facts = facts_of(found.base, METRIC, DRAWN, "hash") | {"trials": 9}
    ledger = Ledger.open(out, facts)
    assert told_progress(out, {}) == [
        f"{out}: a search of {METRIC}; 0 of 9 trials ended; 0 begun, 9 waiting.",
        "No trial has a value yet.", NO_HOURS,
    ]  # fmt: skip
    ledger.write(made(4, ended="failed", failures=3, error="<no memory>"))
    assert told_progress(out, {})[1] == "No trial has a value yet."
    for trial in found.trials:
        ledger.write(trial)
    assert told_progress(out, {"head": 2.0}) == [
        f"{out}: a search of {METRIC}; 5 of 9 trials ended, 1 failed, 2 ran to its end, "
        "2 stopped early; 1 begun, 3 waiting.",
        f"Best: trial 003, {METRIC} 14.00 with training.learning_rate=0.0008, "
        "objective.action_loss=infonce.",
        "Machine hours so far: 2.00 x head.",
    ]


def test_a_study_says_how_many_runs_are_done_and_waiting_and_the_best(tmp_path: Path) -> None:
    runs = [str(tmp_path / name) for name in ("random", "karma", "waits", "din", "begun")]
    note_study(str(tmp_path), runs)
    for run, recipe in zip(runs, ("popularity", "karma_text", "", "ctr_din", "toy"), strict=True):
        if recipe:
            write_json({"recipe": recipe}, f"{run}/config.json")
    write_json({"HR@50": 99.0}, f"{runs[0]}/metrics.json")  # a floor is not what was looked for
    write_json({"HR@50": 41.25}, f"{runs[1]}/metrics.json")
    write_json({"AUC": 30.0}, f"{runs[3]}/metrics.json")
    assert told_progress(str(tmp_path), {}) == [
        f"{tmp_path}: a study of 5 runs; 3 finished, 1 begun, 1 waiting.",
        "Best: HR@50 41.2 (karma).", NO_HOURS,
    ]  # fmt: skip


def test_records_say_which_rows_they_are_of_and_the_best(tmp_path: Path) -> None:
    write_record(tmp_path, "karma_text", 0, outcomes(2))
    write_record(tmp_path, "action_only", 0, outcomes(1))
    write_record(tmp_path, "popularity", 0, outcomes(3))
    told = told_progress(str(tmp_path), {})
    assert told[0] == f"{tmp_path}: 3 records of 3 rows on toy."
    assert told[1].startswith("Best: HR@50 ") and told[1].endswith("(karma_text-seed0).")


def test_a_run_says_what_it_says_alone(tmp_path: Path) -> None:
    run = str(tmp_path)
    write_json({"recipe": "ctr_din"}, f"{run}/config.json")
    write_json({"AUC": 61.26, "seconds": 60.0}, f"{run}/metrics.json")
    assert told_progress(run, {}) == [f"{run}: finished, AUC 61.3; 60 seconds.", NO_HOURS]


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_another_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"is no run, search or study: it has no config\.json"):
        told_progress(str(tmp_path / name), {})

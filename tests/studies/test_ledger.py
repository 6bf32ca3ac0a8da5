from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from karma_ray.config import Config, override
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.studies.ledger import Ledger, Search, Trial, best_of, describe, facts_of

METRIC = "valid/HR@50"


def trial(name: str, value: float | None, **changes: Any) -> Trial:
    curve = () if value is None else ({"step": 20, METRIC: value},)
    return Trial(name, {}, curve, **({"ended": "ran to its end"} | changes))


def test_a_trial_whose_metric_is_no_number_never_wins() -> None:
    trials = [trial("a", float("nan")), trial("b", 3.0), trial("c", float("inf")), trial("d", 2.0)]
    assert best_of(trials, METRIC).name == "b"
    assert best_of(trials[::-1], METRIC).name == "b"


def test_a_trial_that_was_stopped_early_wins_only_over_others_that_were() -> None:
    stopped = trial("a", 9.0, ended="stopped early")
    assert best_of([stopped, trial("b", 3.0)], METRIC).name == "b"
    assert best_of([stopped, trial("b", 8.0, ended="stopped early")], METRIC).name == "a"


def test_a_search_without_a_single_number_says_what_it_found_instead() -> None:
    with pytest.raises(KarmaRayError, match=r"every trial failed.*valid/HR@50 of nan"):
        best_of([trial("a", float("nan")), trial("b", None)], METRIC)
    with pytest.raises(KarmaRayError, match=r"every trial failed.*out of memory"):
        best_of([trial("a", None, ended="failed", error="out of memory")], METRIC)


def test_the_table_tells_an_error_only_of_a_trial_that_ended_by_it() -> None:
    once = trial("a", 3.0, failures=1, error="the worker died")
    never = trial("b", None, ended="failed", failures=3, error="no memory")
    told = describe(Search(METRIC, Config(), (once, never), once, {})).splitlines()
    assert told[1].endswith("ran to its end") and told[2].endswith("no memory")


def test_trials_are_read_as_they_were_written(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    assert ledger.trials() == []
    second = trial("001", None, ended="failed", failures=3, error="no memory")
    first = Trial("000", {"objective.lambda_dec": 0.1, "objective.action_loss": "bce"})
    ledger.write(second)
    ledger.write(first)
    assert ledger.trials() == [first, second]


def test_a_folder_is_continued_by_its_own_search_alone(tmp_path: Path) -> None:
    base, drawn = Config(), {"objective.lambda_dec": "0 to 1"}
    out, facts = str(tmp_path), facts_of(base, METRIC, drawn, "hash")
    Ledger.open(out, facts)
    Ledger.open(out, facts)
    Ledger.open(out, facts_of(override(base, ["training.report_every=7"]), METRIC, drawn, "hash"))

    def refused(message: str, *others: Any) -> None:
        with pytest.raises(InputError, match=rf"--out: .* holds another search.*: {message}$"):
            Ledger.open(out, facts_of(*others))

    longer = override(base, ["training.steps=7"])
    refused(f"training.steps was {base.training.steps}, now 7", longer, METRIC, drawn, "hash")
    refused("METRIC was valid/HR@50, now valid/MRR", base, "valid/MRR", drawn, "hash")
    refused("--data was hash, now other", base, METRIC, drawn, "other")
    refused(
        "SPACE objective.lambda_dec was 0 to 1, now absent; SPACE seed was absent, now 1 to 2",
        base, METRIC, {"seed": "1 to 2"}, "hash",
    )  # fmt: skip


def test_a_folder_of_a_run_is_no_place_for_a_search(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds a run; a search needs a folder for itself"):
        Ledger.open(str(tmp_path), facts_of(Config(), METRIC, {}, "hash"))
    assert not (tmp_path / "search.json").exists()


def test_what_early_stopping_saved_is_the_share_of_steps_that_were_not_run() -> None:
    base = override(Config(), ["training.steps=20"])
    early = Trial("b", {}, ({"step": 5, METRIC: 1.0},), "stopped early")
    whole, failed = trial("a", 3.0), trial("c", None, ended="failed")
    found = Search(METRIC, base, (whole, early, failed), whole, {})
    assert found.saved_share() == 15 / 40

"""The page of a search says what its trials say."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from karma_ray.artifacts import write_json
from karma_ray.studies.ledger import Compared, Measured, shown
from karma_ray.studies.search_page import importances, write_search_page
from karma_ray.studies.search_plots import front
from tests.studies.searches import made, search

PICTURE = "data:image/png;base64,"


def page(out: Path) -> str:
    write_search_page(search(), "my space.py", str(out))
    return (out / "report.html").read_text()


def test_the_page_names_the_best_settings_beside_the_default_and_how_trials_ended(
    tmp_path: Path,
) -> None:
    text = page(tmp_path)
    assert "6 trials: 2 ran to its end, 2 stopped early, 1 failed, 1 unfinished." in text
    assert "Trial 003 is the best one, with valid/HR@50 14.00 at step 40." in text
    rate = shown(search().base.training.learning_rate)
    assert f"<td>training.learning_rate</td><td>0.0008</td><td>{rate}</td>" in text
    assert "<td>objective.action_loss</td><td>infonce</td><td>pairwise</td>" in text
    assert f"--config {tmp_path}/best.json" in text
    assert "python jobs/tune.py &#39;my space.py&#39; --out" in text


def test_the_page_shows_every_trial_once_the_best_first_and_failures_with_their_reason(
    tmp_path: Path,
) -> None:
    table = page(tmp_path).partition("<h2>Trials</h2>")[2]
    places = [table.index(f"<td>{number:03d}</td>") for number in (3, 0, 2, 1, 5, 4)]
    assert places == sorted(places)
    assert "<td>failed</td><td>3</td><td>&lt;no memory&gt;</td>" in table


def test_the_page_says_what_early_stopping_saved(tmp_path: Path) -> None:
    text = page(tmp_path)
    # of 4 trials of 40 steps two were stopped, after 10 and after 20
    assert "110 steps were run. Stopping weak trials saved 31 % of the 40 steps" in text
    assert "<tr><td>10</td><td>1</td></tr>" in text and "<tr><td>20</td><td>1</td></tr>" in text


def test_importance_curves_settings_and_the_front_are_pictures(tmp_path: Path) -> None:
    assert page(tmp_path).count(PICTURE) == 4
    shares = importances(search())
    assert shares.keys() == search().distributions.keys()
    assert sum(shares.values()) == pytest.approx(1)
    assert shares == importances(search())


def test_a_field_that_decides_alone_has_all_the_importance() -> None:
    trials = tuple(made(n, (5.0, 9.0)[n % 2]) for n in range(6))  # the action loss alternates
    assert importances(replace(search(), trials=trials))["objective.action_loss"] > 0.9


@pytest.mark.parametrize("values", [(1.0, 2.0, 3.0), (4.0,) * 6], ids=["too few", "all the same"])
def test_importance_is_not_guessed(tmp_path: Path, values: tuple[float, ...]) -> None:
    trials = tuple(made(n, value) for n, value in enumerate(values))
    found = replace(search(), trials=trials, best=trials[0])
    assert importances(found) == {}
    write_search_page(found, "space.py", str(tmp_path))
    assert "Importance is estimated from 4 trials" in (tmp_path / "report.html").read_text()


def test_the_front_holds_the_whole_trials_that_no_other_one_beats_in_both() -> None:
    def placed(number: int, first: float, second: float, **changes: str):
        point = {"step": 40, "valid/HR@50": 1.0, "HR@200": first, "JS@50": second}
        return replace(made(number, **changes), curve=(point,))

    trials = (
        placed(0, 10, 30), placed(1, 20, 20), placed(2, 15, 20), placed(3, 30, 5),
        placed(4, 90, 90, ended="stopped early"), placed(5, 30, 4),
    )  # fmt: skip
    found = front(replace(search(), trials=trials))
    assert [trial.name for trial in found] == ["000", "001", "003"]


def test_a_comparison_of_another_trial_is_not_shown(tmp_path: Path) -> None:
    compared = (Compared("HR@50", 30.0, 32.5, 2.5, (1.0, 4.0), "*"),)
    row = "<td>HR@50</td><td>30.00</td><td>32.50</td><td>+2.50 *</td><td>[+1.00, +4.00]</td>"
    for name in ("003", "000"):
        kept = asdict(Measured(name, (1, 2), compared))
        write_json(kept, str(tmp_path / "measured" / "comparison.json"))
        assert (row in page(tmp_path)) is (name == "003")


def test_the_first_trial_that_ends_makes_a_page(tmp_path: Path) -> None:
    first = made(0, 2.0, ended="stopped early")
    write_search_page(replace(search(), trials=(first,), best=first), "space.py", str(tmp_path))
    assert "1 trial: 1 stopped early." in (tmp_path / "report.html").read_text()

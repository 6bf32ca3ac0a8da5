"""The report of studies says what the records say, and where nothing shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from karma_ray.studies.page import write_report
from tests.studies.study_records import outcomes, write_record


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    for seed in (0, 1):
        write_record(folder, "action_only", seed, outcomes(2))
        write_record(folder, "embedding_to_text", seed, outcomes(4))
        write_record(folder, "history_to_text", seed, outcomes(2, shift=4 * seed))
    return folder


def test_the_report_sets_our_differences_beside_the_papers(results: Path) -> None:
    markdown, page = write_report(results)
    text = markdown.read_text()
    assert markdown == results / "tables.md"
    assert f"python jobs/ablate.py report --results {results}" in text
    row = next(line for line in text.splitlines() if line.startswith("| with Task 2 | Pairwise"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # gAUC, HR@200, HR@1000 (not measured here), JS@50: paper, ours, sign
    assert cells[2:5] == ["+0.43", "+0.00 ± 0.00", "not established"]
    assert cells[5:8] == ["+19.19", "+40.00 ± 0.00 *", "same"]
    assert cells[8:11] == ["+19.31", "–", "–"]
    assert "Order by HR@200, paper: with Task 2 > with Task 1; here: the same." in text
    assert page.read_text().count("data:image/png;base64,") == 3
    assert all((results / "report" / name).exists() for name in (
        "gains.png", "table1-toy-differences.png", "table1-toy-curves.png"))  # fmt: skip


def test_the_report_says_plainly_where_an_effect_does_not_show(results: Path) -> None:
    text = write_report(results)[0].read_text()
    sentence = next(line for line in text.splitlines() if line.startswith("- with Task 1:"))
    # one seed loses 4 of 40 users' two hits: -4 points, the other none; the seeds disagree
    assert "no established difference on" in sentence and "HR@50 (-2.00, detectable" in sentence
    assert "higher on HR@10 (+40.00)" in text


def test_a_row_that_changes_nothing_is_said_to_change_nothing(tmp_path: Path) -> None:
    for row in ("action_only", "null_detached_separate"):
        write_record(tmp_path / "r", row, 0, outcomes(2))
    text = write_report(tmp_path / "r")[0].read_text()
    assert "decoder separate (null): the same on every test example." in text


def test_pictures_of_a_former_report_are_gone(results: Path) -> None:
    write_report(results)
    (results / "report" / "table1-renamed-curves.png").write_bytes(b"old")
    write_report(results)
    assert len(list((results / "report").glob("*.png"))) == 3


def test_cost_collapse_and_time_are_told(results: Path) -> None:
    text = write_report(results)[0].read_text()
    assert "| with Task 2 | 0, 1 | 1 | 60 ± 0 | 40 ± 0 | 1.50 ± 0.00 | – |" in text
    assert "| with Task 2 | 12.50 ± 0.00 | 0.25 ± 0.00 | gap (2) |" in text
    # HR@50 after 40 s, which is the end for both: 30, none ahead; no other metric was validated
    assert "| with Task 2 | 40 | 40 | – | 30.0 (+0.00) / 30.0 (+0.00) | – | – | +10.00 |" in text
    assert "| Pairwise CE, clicks alone | 40 | – | – | 30.0 | – | – | +10.00 |" in text
    assert "commits 0123456789" in text


def test_a_resumed_run_tells_no_cost(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_record(tmp_path / "r", "action_only", seed, outcomes(2), resumed=seed == 1,
                     peak_gib={"host": 1.5 - seed}, seconds=60.0 - seed)  # fmt: skip
    text = write_report(tmp_path / "r")[0].read_text()
    assert "| Pairwise CE, clicks alone | 0, 1 | 1 | 60 | 40 | 1.50 | – |" in text


def test_rows_that_share_a_published_number_stand_level_in_the_papers_order(tmp_path: Path) -> None:
    for row, hits in (("karma_text", 1), ("ar_mse_add", 2), ("ar_mse_replace", 3)):
        write_record(tmp_path / "r", row, 0, outcomes(hits))
    text = write_report(tmp_path / "r")[0].read_text()
    order = "Order by HR@200, paper: AR + MSE, add = AR + MSE, replace; here: the same."
    assert order in text


def test_a_report_of_the_same_records_is_the_same(results: Path) -> None:
    markdown, _ = write_report(results)
    first = markdown.read_text()
    write_report(results)
    assert markdown.read_text() == first


def test_one_seed_is_said_to_be_one(tmp_path: Path) -> None:
    write_record(tmp_path / "r", "action_only", 0, outcomes(2))
    write_record(tmp_path / "r", "karma_text", 0, outcomes(3))
    assert (
        "With one seed the spread over seeds is unknown."
        in write_report(tmp_path / "r")[0].read_text()
    )


def test_no_records_make_an_empty_report(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    markdown, page = write_report(tmp_path / "none")
    assert "No records." in page.read_text() and markdown.exists()


def test_a_table_that_has_only_rows_of_table_1_is_not_told_twice(tmp_path: Path) -> None:
    for row in ("action_only", "karma_text"):
        write_record(tmp_path / "r", row, 0, outcomes(2))
    assert "## Baselines" not in write_report(tmp_path / "r")[0].read_text()
    write_record(tmp_path / "r", "popularity", 0, outcomes(1))
    assert "## Baselines" in write_report(tmp_path / "r")[0].read_text()


def test_counting_is_told_once_where_only_the_training_differs(tmp_path: Path) -> None:
    write_record(tmp_path / "r", "popularity", 0, outcomes(1))
    for settings in ((), ("training.steps=7",)):
        for row in ("action_only", "karma_text"):
            write_record(tmp_path / "r", row, 0, outcomes(2), *settings)

    def told() -> list[str]:
        text = write_report(tmp_path / "r")[0].read_text()
        return [line for line in text.splitlines() if line.startswith("## Baselines")]

    assert told() == ["## Baselines: toy"]
    write_record(tmp_path / "r", "hllm", 0, outcomes(2), "training.steps=7")
    assert told() == ["## Baselines: toy, training.steps=7"]

"""What stands at a glance is what the records say, nulls and rivals included."""

from __future__ import annotations

from pathlib import Path

from karma_ray.studies.page import write_report
from tests.studies.study_records import outcomes, write_record


def lines(results: Path) -> list[list[str]]:
    """Cells of every table line above the first group."""
    text = write_report(results)[0].read_text()
    glance = text.split("## At a glance")[1].split("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in glance.splitlines()
        if line.startswith("| toy")
    ]


def test_a_gain_counts_only_beyond_every_null(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_record(tmp_path, "action_only", seed, outcomes(2))
        write_record(tmp_path, "embedding_to_text", seed, outcomes(4))
        write_record(tmp_path, "karma_text", seed, outcomes(3))
        write_record(tmp_path, "null_detached", seed, outcomes(2))
        write_record(tmp_path, "null_shuffled", seed, outcomes(3))
        write_record(tmp_path, "null_both_shuffled", seed, outcomes(3))
    task2, both = lines(tmp_path)[:2]
    assert task2[:4] == ["toy", "with Task 2", "2", "+40.00 ± 0.00 *"]
    assert task2[-1] == "HR@10, HR@50, HR@200"
    assert both[3] == "+20.00 ± 0.00 *" and both[-1] == "nowhere"


def test_without_a_null_of_the_same_tasks_nothing_is_said_of_it(tmp_path: Path) -> None:
    write_record(tmp_path, "action_only", 0, outcomes(2))
    write_record(tmp_path, "karma_text", 0, outcomes(3))
    write_record(tmp_path, "null_shuffled", 0, outcomes(2))  # a null of Task 2 alone
    karma, null = lines(tmp_path)[:2]
    assert karma[3] == "+20.00 (*)"  # one seed
    assert karma[-1] == "no null"
    assert null[1] == "Task 2 with other items' texts (null)" and null[-1] == ""


def test_karma_stands_beside_the_best_rival_of_each_metric(tmp_path: Path) -> None:
    write_record(tmp_path, "popularity", 0, outcomes(1))
    for seed in (0, 1):
        write_record(tmp_path, "karma_text", seed, outcomes(3))
        write_record(tmp_path, "action_only", seed, outcomes(5))  # no rival: Table 1 has it
        write_record(tmp_path, "oracle", seed, outcomes(5))  # a ceiling
        write_record(tmp_path, "sasrec", seed, outcomes(2, shift=seed))
    line = lines(tmp_path)[-1]
    assert line[:3] == ["toy", "KARMA, text", "2"]
    # 60 against 40 and, where one user of 40 has lost two hits, 39; counting has 20
    assert line[4] == "60.0 ± 0.0; +20.50 * to SASRec (ids); +40.00 * to popularity"
    assert line[8] == "50.0 ± 0.0; +0.00 to SASRec (ids); +0.00 to popularity"
    assert line[-1] == "SASRec (ids)"
    write_record(tmp_path, "karma_infonce", 0, outcomes(4))
    before, infonce = lines(tmp_path)[-2:]
    assert before == line  # and no rival of its own kind
    assert infonce[1:3] == ["KARMA, text, over HLLM's loss", "1"]


def test_a_null_of_one_seed_is_said_to_be_one(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_record(tmp_path, "action_only", seed, outcomes(2))
        write_record(tmp_path, "embedding_to_text", seed, outcomes(4))
    write_record(tmp_path, "null_shuffled", 0, outcomes(2))
    assert lines(tmp_path)[0][-1] == "HR@10, HR@50, HR@200 (one seed)"
    assert (tmp_path / "report" / "gains.png").exists()


def test_rows_over_another_loss_stand_over_clicks_alone_with_that_loss(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_record(tmp_path, "action_only", seed, outcomes(1))
        write_record(tmp_path, "hllm", seed, outcomes(3))
        write_record(tmp_path, "karma_infonce", seed, outcomes(4))
        write_record(tmp_path, "null_both_shuffled_infonce", seed, outcomes(3))
    karma, null = lines(tmp_path)[:2]
    assert karma[1:4] == ["KARMA, text, over HLLM's loss", "2", "+20.00 ± 0.00 *"]
    assert karma[-1] == "HR@10, HR@50, HR@200"
    assert null[3] == "+0.00 ± 0.00" and null[-1] == ""

"""Records are lines of their data set's file: one is added or replaced, none is lost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from karma_ray import recipes
from karma_ray.config import override
from karma_ray.errors import InputError
from karma_ray.studies.plan import Data
from karma_ray.studies.record_files import finished_record, write_found, write_record
from karma_ray.studies.records import outcomes_of, read_records
from karma_ray.studies.trial import Trial
from tests.studies.study_records import outcomes

SHOP = Data("memory://nowhere", "shop", "d")


def trial(row: str, *settings: str, seed: int = 0) -> Trial:
    config = override(recipes.build(row), [*settings, f"seed={seed}"])
    return Trial(row, config, settings, settings)


def lines(results: Path) -> list[str]:
    return (results / "shop.jsonl").read_text().splitlines()


def test_a_file_that_is_measured_with_is_named_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("here", "there", "hm", "tiny"):  # folders of the names `hm` and `tiny` say nothing
        Path(name).mkdir()
        Path(name, "words.tsv").write_text("phrase\tparaphrase\nmug\tcup\n")
    here, there, usual = (
        trial("tfidf", f"evaluation.paraphrases={name}")
        for name in ("here/words.tsv", "there/words.tsv", "hm")
    )
    for made in (here, usual):
        write_found(made, {"metrics": {}}, SHOP, tmp_path)
    known = read_records(tmp_path)
    (named,) = (r["set"][0].partition("=")[2] for r in known if "words" in r["set"][0])
    assert named.startswith("words.tsv@")
    assert {r["config"]["evaluation"]["paraphrases"] for r in known} == {named, "hm"}
    assert {r["config"]["model"]["item_encoder"]["checkpoint"] for r in known} == {"tiny"}
    assert all(finished_record(made, SHOP, known) for made in (here, there, usual))
    Path("there/words.tsv").write_text("phrase\tparaphrase\nmug\tbeaker\n")
    assert finished_record(there, SHOP, known) is None


def test_a_record_that_is_replaced_leaves_the_other_lines_alone(tmp_path: Path) -> None:
    for seed in (2, 0, 1):
        write_found(trial("action_only", seed=seed), {"metrics": {"HR@10": 1 / 3}}, SHOP, tmp_path)
    before = lines(tmp_path)
    write_found(trial("action_only", seed=1), {"metrics": {"HR@10": 2.0}}, SHOP, tmp_path)
    after = lines(tmp_path)
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]
    assert [r["seed"] for r in read_records(tmp_path)] == [0, 1, 2]
    assert read_records(tmp_path)[0]["metrics"] == {"HR@10": 1 / 3}


def test_another_configuration_of_a_row_and_seed_has_a_line_of_its_own(tmp_path: Path) -> None:
    short, long = trial("action_only"), trial("action_only", "training.steps=7")
    for one in (short, long, long):
        write_found(one, {"metrics": {}}, SHOP, tmp_path)
    known = read_records(tmp_path)
    assert len({r["name"] for r in known}) == len(known) == 2
    for one in (short, long):
        found = finished_record(one, SHOP, known)
        assert found is not None and found["set"] == list(one.extra)


def test_studies_that_finish_at_once_lose_no_record(tmp_path: Path) -> None:
    def add(seed: int) -> None:
        write_found(trial("action_only", seed=seed), {"metrics": {}}, SHOP, tmp_path)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(add, range(24)))
    assert {r["seed"] for r in read_records(tmp_path)} == set(range(24))


def test_values_per_example_are_found_by_the_record(tmp_path: Path) -> None:
    examples, packed = outcomes(3).packed()
    found = {"metrics": {}, "examples": examples, "outcomes": packed}
    write_record(trial("action_only"), found, SHOP, tmp_path)
    (record,) = read_records(tmp_path)
    kept = outcomes_of(record, tmp_path)
    assert kept is not None and kept.rank.tolist() == outcomes(3).rank.tolist()


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    write_found(trial("action_only"), {"metrics": {}}, SHOP, tmp_path)
    with (tmp_path / "shop.jsonl").open("a") as file:
        file.write("<<<<<<< HEAD\n")
    with pytest.raises(InputError, match=r"shop\.jsonl:2.*not JSON"):
        read_records(tmp_path)

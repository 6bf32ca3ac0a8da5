"""A study runs what has no record yet, goes on where it was stopped, and ends in a report."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.ablate import main
from karma_ray import cli, recipes
from karma_ray.artifacts import read_lines, write_json
from karma_ray.cluster.study import RayMachine
from karma_ray.config import override, to_dict
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.errors import InputError
from karma_ray.studies.plan import (
    SETTINGS,
    Data,
    named_rows,
    parsed_seeds,
    planned,
    possible_rows,
)
from karma_ray.studies.record_files import finished_record
from karma_ray.studies.records import OUTCOMES, baseline_key, outcomes_of, read_records, run_key
from karma_ray.studies.rows import Row
from karma_ray.studies.study import Outcome, run_study
from karma_ray.studies.tables import TABLES
from karma_ray.studies.trial import Trial, first_stage_key
from tests.tiny_run import SMALL_STUDY

SMALL = (*SMALL_STUDY, "training.checkpoint_every=2")
ONE_THREAD = ("training.threads_per_worker=1",)
"""Sums in one order, so that a run repeated gives every digit again."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = str(tmp_path_factory.mktemp("shop") / "toy")
    write_toy_shop(folder, ToyShopConfig(num_items=240, num_users=60))
    return Data.open(folder)


# --- what is asked for -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [0, 1, 2]), ("0,4", [0, 4]), ("7,", [7]), ("1,1,0", [1, 0])]
)
def test_seeds_are_a_count_or_a_list(text: str, seeds: list[int]) -> None:
    assert parsed_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "0", "-1", "two", "1.5", ",", "0,-2"])
def test_other_seeds_are_refused_with_examples(text: str) -> None:
    with pytest.raises(InputError, match=r"--seeds.*0,1,2"):
        parsed_seeds(text)


def test_unknown_names_are_refused_with_the_choices(data: Data) -> None:
    with pytest.raises(InputError, match=r"TABLE.*table1"):
        named_rows("table9", None)
    with pytest.raises(InputError, match=r"karma_txt.*action_only"):
        named_rows("table1", "action_only,karma_txt")
    with pytest.raises(InputError, match="--data"):
        Data.open("/nowhere/at/all")
    with pytest.raises(InputError, match="stepz"):
        planned([Row("action_only", "")], [0], data, ["training.stepz=1"])
    trials = planned([Row("action_only", "")], [0], data)
    for limits in ({"concurrent": 0}, {"max_minutes": -1.0}):
        with pytest.raises(InputError, match=next(iter(limits)).replace("_", "-")):
            run_study(trials, data, "results", RayMachine(), runs="runs", cache="cache", **limits)  # type: ignore[arg-type]


def test_rows_that_cannot_run_are_skipped_with_the_reason(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, skipped = possible_rows(named_rows("table1", None), data)
    names = {row.name for row in TABLES["table1"].rows}
    assert {row.name for row in rows} == names - {"karma_multimodal"}
    assert f"python jobs/features.py {data.uri}" in skipped["karma_multimodal"]
    (row,) = named_rows("table1", "karma_multimodal,karma_multimodal")
    allowed, _ = possible_rows([row], data, ["collate.visual_features=elsewhere"])
    assert [row.name for row in allowed] == ["karma_multimodal"]
    monkeypatch.delitem(recipes.TRAINED, "karma_text")
    _, skipped = possible_rows(named_rows("table1", "karma_text"), data)
    assert "karma_text" in skipped["karma_text"]


@pytest.mark.parametrize("table", TABLES)
def test_every_row_with_a_recipe_can_be_built(table: str, data: Data) -> None:
    rows = [row for row in TABLES[table].rows if row.built_from in recipes.names()]
    assert TABLES[table].baseline in {row.name for row in rows}
    of_llm = [row for row in rows if row.built_from in recipes.MADE_FOR_LLM]
    small = [row for row in rows if row not in of_llm]
    assert len(planned(small, [0, 1], data)) == 2 * len(small)
    named = planned(of_llm, [0], data, ["model.checkpoint=Qwen/Qwen3-0.6B"])
    possible = possible_rows(rows, data)[0]
    assert len(named) == len(of_llm) and not any(row in possible for row in of_llm)
    assert len({row.name for row in TABLES[table].rows}) == len(TABLES[table].rows)


def test_rows_with_pretrained_weights_are_trained_gently_and_stay_comparable(data: Data) -> None:
    rows = [
        Row("action_only", ""), Row("fast", "", "karma_text", ("training.learning_rate=1e-3",)),
        Row("sasrec", "", "sasrec"),
    ]  # fmt: skip
    extra = ["model.checkpoint=Qwen/Qwen3-0.6B", "warmup.learning_rate=2e-4"]
    trials = planned(rows, [0], data, extra)
    rates = [trial.config.training.learning_rate for trial in trials]
    assert rates[:2] == [5e-5, 1e-3] and rates[2] > 5e-5
    for trial in trials[:2]:
        assert trial.config.model.item_encoder.pool == "mean"
        assert trial.config.warmup.learning_rate == 2e-4
    keys = set()
    for trial in trials:
        record = {"config": to_dict(trial.config), "assignments": list(trial.assignments)}
        keys.add(baseline_key(record, "action_only"))
    assert keys == {run_key(to_dict(trials[0].config), None)}
    (small,) = planned(rows[:1], [0], data)
    assert not any("pool" in assignment for assignment in small.assignments)


def test_trials_come_seed_by_seed_and_say_what_was_set(data: Data) -> None:
    rows = [Row("action_only", ""), Row("a", "", "karma_text", ("objective.lambda_dec=0.3",))]
    trials = planned(rows, [1, 0], data, [*SMALL, "training.steps=5"])
    assert [t.name for t in trials] == [
        "action_only-seed1", "a-seed1", "action_only-seed0", "a-seed0",
    ]  # fmt: skip
    assert trials[1].config.objective.lambda_dec == 0.3
    assert trials[1].config.training.steps == 5
    assert trials[1].extra == (*SMALL, "training.steps=5")
    assert trials[1].assignments == (*SETTINGS["toy_shop"], *SMALL, "training.steps=5")


def test_recipes_that_are_compared_share_their_first_stages(data: Data) -> None:
    def key(recipe: str, *more: str) -> str:
        return first_stage_key(override(recipes.build(recipe), [*SMALL, *more]), data.uri)

    assert key("action_only") == key("karma_text") == key("null_shuffled")
    assert key("action_only", "seed=1") != key("action_only")
    assert key("action_only_unwarmed") != key("action_only")
    assert key("sasrec") != key("action_only")


# --- what happens ----------------------------------------------------------------------------


class Study:
    """One study's folders."""

    def __init__(self, root: Path, data: Data, cache: str) -> None:
        self.results, self.runs, self.cache = root / "results", str(root / "runs"), cache
        self.data = data

    def further(self, root: Path) -> Study:
        """A study in another folder that knows the records of this one."""
        shutil.copytree(self.results, root / "results")
        return Study(root, self.data, self.cache)

    def trials(self, *rows: str, more: tuple[str, ...] = ()) -> list[Trial]:
        return planned([Row(row, row) for row in rows], [0], self.data, (*SMALL, *more))

    def run(self, trials: list[Trial], **limits: Any) -> Outcome:
        return run_study(
            trials, self.data, self.results, RayMachine(), runs=self.runs, cache=self.cache,
            **limits,
        )  # fmt: skip

    def lines(self) -> list[str]:
        return (self.results / "toy_shop.jsonl").read_text().splitlines()

    def record(self, name: str) -> dict[str, Any]:
        (found,) = (r for r in read_records(self.results) if r["name"] == name)
        return found


@pytest.fixture(scope="module")
def study(
    ray_cluster: None, data: Data, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Study, Outcome]:
    """One finished trial of two."""
    root = tmp_path_factory.mktemp("study")
    made = Study(root, data, str(root / "cache"))
    return made, made.run(made.trials("action_only", more=ONE_THREAD), concurrent=2)


@pytest.mark.ray
def test_a_finished_run_leaves_all_that_the_report_needs(study: tuple[Study, Outcome]) -> None:
    made, outcome = study
    assert outcome.done == ["action_only-seed0"] and not outcome.failed
    record = made.record("action_only-seed0")
    assert record["row"] == record["recipe"] == "action_only" and record["seed"] == 0
    assert record["steps"] == 6 and not record["resumed"] and record["peak_gib"]["host"] > 0.1
    assert [point["step"] for point in record["curve"]] == [3, 6]
    seconds = [point["seconds"] for point in record["curve"]]
    assert 0 < seconds[0] < seconds[1] <= round(record["stage_seconds"]["joint"], 1)
    assert set(record["stage_seconds"]) == {"pretrain", "warmup", "joint"}
    assert {"decode_gap", "collapse/effective_rank_e"} <= set(record["probes"])
    assert record["data_hash"] == made.data.hash and record["config"]["training"]["steps"] == 6
    found = outcomes_of(record, made.results)
    assert found is not None
    values = found.values("HR@50")
    assert values is not None
    assert values[0].mean() == pytest.approx(record["metrics"]["HR@50"])
    for path in (made.results / OUTCOMES).iterdir():
        assert path.stat().st_size < 60_000


@pytest.mark.ray
def test_a_stopped_study_goes_on_and_makes_nothing_twice(
    study: tuple[Study, Outcome], tmp_path: Path
) -> None:
    made = study[0].further(tmp_path)
    before = made.lines()
    outcome = made.run(made.trials("action_only", "popularity"), concurrent=1)
    assert outcome.there == ["action_only-seed0"] and outcome.done == ["popularity-seed0"]
    assert len(made.lines()) == 2 and before[0] in made.lines()
    again = made.run(made.trials("action_only", "popularity"))
    assert again.told() == "0 made; 2 already there"


@pytest.mark.ray
def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_result(
    study: tuple[Study, Outcome], data: Data, tmp_path: Path
) -> None:
    from karma_ray.runs.pipeline import train_run
    from karma_ray.studies.record_files import run_folder

    made, _ = study
    other = Study(tmp_path, data, made.cache)
    (trial,) = other.trials("action_only", more=ONE_THREAD)

    class Killed(Exception):
        pass

    def die(step: int, metrics: object) -> None:
        raise Killed

    folder = run_folder(trial, data, other.runs)
    with pytest.raises(Killed):
        train_run(trial.config, data.uri, folder, on_validate=die, cache=made.cache)
    assert (Path(folder) / "checkpoints" / "joint" / "step-0000002").exists()
    assert other.run([trial]).done == [trial.name]
    found, whole = other.record(trial.name), made.record(trial.name)
    assert found["resumed"] and not whole["resumed"]
    losses = _losses(folder)
    assert list(losses) == [2, 4, 6]
    assert losses == _losses(run_folder(trial, data, made.runs))
    for record in (found, whole):
        del record["metrics"]["seconds"]
    assert found["metrics"] == whole["metrics"]


def _losses(run: str) -> dict[int, float]:
    """Loss of the joint stage by step."""
    return {
        line["step"]: line["loss/total"]
        for line in read_lines(f"{run}/metrics.jsonl")
        if line["stage"] == "joint" and "loss/total" in line
    }


@pytest.mark.ray
def test_a_trial_that_fails_is_told_and_the_others_run(
    study: tuple[Study, Outcome], data: Data, tmp_path: Path
) -> None:
    from karma_ray.studies.record_files import run_folder

    made, _ = study
    other = Study(tmp_path, data, made.cache)
    trials = other.trials("action_only", "popularity")
    # a run folder that was started with another configuration is not continued
    changed = override(trials[0].config, ["training.learning_rate=0.5"])
    folder = run_folder(trials[0], data, other.runs)
    from karma_ray.config import to_dict

    write_json(to_dict(changed), f"{folder}/config.json")
    outcome = other.run(trials, concurrent=2)
    assert outcome.done == ["popularity-seed0"]
    assert "training.learning_rate" in outcome.failed["action_only-seed0"]


@pytest.mark.ray
def test_another_setting_or_other_data_are_not_taken_for_the_same(
    study: tuple[Study, Outcome],
) -> None:
    made, _ = study
    known = read_records(made.results)
    (trial,) = made.trials("action_only")
    (longer,) = made.trials("action_only", more=("training.steps=8",))
    (faster,) = made.trials("action_only", more=("training.threads_per_worker=2",))
    assert finished_record(trial, made.data, known)
    assert finished_record(faster, made.data, known)
    assert finished_record(longer, made.data, known) is None
    elsewhere = Data(made.data.uri, made.data.name, "other")
    assert finished_record(trial, elsewhere, known) is None
    without = [{**record, "outcomes": "gone"} for record in known]
    assert finished_record(trial, made.data, without)  # a study goes on from records alone


@pytest.mark.ray
def test_a_run_of_another_row_is_told_under_this_one_and_not_made_again(
    study: tuple[Study, Outcome], tmp_path: Path
) -> None:
    made, _ = study
    other = made.further(tmp_path)
    there = read_records(made.results)
    trials = [replace(trial, row="again") for trial in made.trials("action_only", more=ONE_THREAD)]
    outcome = other.run(trials)
    assert outcome.there == ["again-seed0"] and not outcome.done
    (again,) = (r for r in read_records(other.results) if r["row"] == "again")
    (first,) = (r for r in there if r["row"] == "action_only" and r["seed"] == 0)
    assert again == {**first, "row": "again", "name": "again-seed0"}
    assert len(read_records(other.results)) == len(there) + 1
    assert other.run(trials).there == ["again-seed0"]


@pytest.mark.ray
def test_when_the_time_is_over_the_rest_is_left(
    study: tuple[Study, Outcome], data: Data, tmp_path: Path
) -> None:
    made, _ = study
    other = Study(tmp_path, data, made.cache)
    trials = other.trials("action_only", "karma_text", more=("training.steps=100000",))
    outcome = other.run(trials, concurrent=1, max_minutes=0.02)
    assert sorted(outcome.left) == ["action_only-seed0", "karma_text-seed0"]
    assert not outcome.done and not outcome.failed and "2 left" in outcome.told()


@pytest.mark.ray
def test_the_job_ends_in_a_report(
    study: tuple[Study, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    made = study[0].further(tmp_path)
    monkeypatch.chdir(tmp_path)
    sets = [flag for assignment in SMALL for flag in ("--set", assignment)]
    main(["table1", "--data", made.data.uri, "--rows", "action_only,karma_text", "--seeds", "0,",
          *sets, "--results", "results", "--cache", made.cache])  # fmt: skip
    told = capsys.readouterr().out
    assert "1 made; 1 already there" in told
    text = Path("results/tables.md").read_text()
    assert "| with Tasks 1 and 2 | Pairwise CE, clicks alone |" in text
    assert "python jobs/ablate.py report --results results" in text
    assert Path("results/report/report.html").exists()
    records = read_records(Path("results"))
    assert [record["name"] for record in records] == ["action_only-seed0", "karma_text-seed0"]
    assert {record["steps"] for record in records} == {6}
    before = Path("results/tables.md").read_text()
    main(["report", "--results", "results"])
    assert Path("results/tables.md").read_text() == before


@pytest.mark.parametrize(
    "flags", [["table9"], ["table1", "--seeds", "no"], ["table1", "--rows", "x"],
              ["table1", "--set", "training.stepz=1"], ["table1", "--set", "training.steps=0"]],
)  # fmt: skip
def test_bad_input_ends_the_job_before_anything_starts(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)  # where a toy shop would be made: no --data
    with pytest.raises(SystemExit) as ended:
        cli.run(main, flags)
    assert ended.value.code == 2 and "error:" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

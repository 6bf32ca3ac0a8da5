"""jobs/diagnose.py on real run folders: two tiny runs of one shop, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from karma_ray import recipes
from karma_ray.artifacts import read_json, write_json
from karma_ray.config import Config, override
from karma_ray.errors import InputError
from karma_ray.runs.model_comparison import diagnose_runs, parse_heads


def _config(recipe: str = "toy", *more: str) -> Config:
    small = [
        "pretrain.steps=8", "warmup.steps=8", "training.steps=4", "training.batch_size=8",
        "training.report_every=2", "training.checkpoint_every=0", "training.encoder_delay=0",
        "training.num_workers=0", "training.threads_per_worker=1", "evaluation.max_examples=40",
    ]  # fmt: skip
    return override(recipes.build(recipe), [*small, *more])


@pytest.fixture(scope="module")
def runs(shop: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `karma` and `action` of the same beginning, and a floor."""
    from karma_ray.runs.pipeline import train_run

    folder = tmp_path_factory.mktemp("diagnosis")
    cache = str(folder / "cache")
    clicks = ("objective.generation=0", "objective.reconstruction=0")
    train_run(_config(), shop, f"{folder}/karma", cache=cache, is_tested=False)
    train_run(_config("toy", *clicks), shop, f"{folder}/action", cache=cache, is_tested=False)
    train_run(_config("popularity"), shop, f"{folder}/floor", cache=cache, is_tested=False)
    return folder


def test_the_papers_figure_frozen_action_only_and_karma(runs: Path, tmp_path: Path) -> None:
    names = [str(runs / "action"), str(runs / "karma")]
    comparison, page = diagnose_runs(names, out=str(tmp_path / "out"), num_items=40)
    assert page == str(tmp_path / "out" / "diagnosis.html")
    assert [subject.name for subject in comparison.subjects] == ["frozen", "action", "karma"]
    value = read_json(str(tmp_path / "out" / "diagnosis.json"))
    assert (value["num_items"], value["notes"]) == (40, [])
    frozen, action, karma = (model["metrics"] for model in value["models"].values())
    assert frozen.keys() == action.keys() == karma.keys()
    assert frozen["collapse/cka_frozen"] == 1.0
    assert 0 < action["collapse/cka_frozen"] < 1 and 0 < karma["collapse/cka_frozen"] < 1
    assert frozen["collapse/category_accuracy"] > 2 * frozen["collapse/category_majority"]
    assert frozen["collapse/effective_rank_e"] > 20  # whitened
    assert action != karma


def test_measuring_again_gives_the_same_numbers(runs: Path) -> None:
    found = [diagnose_runs([str(runs / "karma")], num_items=16)[0] for _ in range(2)]
    first, second = ([s.diagnosis.metrics for s in each.subjects] for each in found)
    assert first == second
    assert (runs / "karma" / "report" / "diagnosis.json").exists()
    assert np.isfinite(list(first[1].values())).all()


def test_a_run_whose_beginning_is_gone_is_diagnosed_without_it(runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs / "karma", copy)
    noted = read_json(f"{copy}/start.json")
    write_json({**noted, "warm": f"{tmp_path}/gone"}, f"{copy}/start.json")
    comparison, _ = diagnose_runs([str(copy)], num_items=16)
    assert [subject.name for subject in comparison.subjects] == ["copy"]
    assert "collapse/cka_frozen" not in comparison.subjects[0].diagnosis.metrics
    assert any("copy started from no longer exist" in note for note in comparison.notes)


def test_the_same_run_twice_is_one_and_equal_names_are_told_apart(
    runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "karma", tmp_path / "karma")
    names = [str(runs / "karma"), str(runs / "karma"), str(tmp_path / "karma")]
    comparison, _ = diagnose_runs(names, out=str(tmp_path / "out"), num_items=16)
    assert [s.name for s in comparison.subjects] == ["frozen", "karma", "karma (2)"]
    metrics = [s.diagnosis.metrics for s in comparison.subjects]
    assert metrics[1] == metrics[2]


def test_what_is_no_finished_training_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"RUN: .* is not a run folder: it has no config\.json"):
        diagnose_runs([str(tmp_path)])
    with pytest.raises(InputError, match="is the floor or ceiling popularity"):
        diagnose_runs([str(runs / "floor")])
    config = read_json(str(runs / "karma" / "config.json"))
    config["model"]["kind"] = "sasrec"
    write_json(config, str(tmp_path / "ids" / "config.json"))
    with pytest.raises(InputError, match="is a sasrec, which reads ids"):
        diagnose_runs([str(tmp_path / "ids")])
    (tmp_path / "cut").mkdir()
    shutil.copy(runs / "karma" / "config.json", tmp_path / "cut")
    with pytest.raises(InputError, match="is not finished: it has no checkpoints/joint/final"):
        diagnose_runs([str(tmp_path / "cut")])


def test_runs_on_other_data_are_refused(runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs / "karma", copy)
    facts = read_json(f"{copy}/data.json")
    write_json(facts | {"input": "another"}, f"{copy}/data.json")
    with pytest.raises(InputError, match=r"was trained on other data .* --data"):
        diagnose_runs([str(runs / "action"), str(copy)])


def test_runs_that_read_other_tokens_are_refused(runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs / "karma", copy)
    config: dict[str, Any] = read_json(f"{copy}/config.json")
    config["collate"]["max_item_tokens"] = 8
    write_json(config, f"{copy}/config.json")
    with pytest.raises(InputError, match="tokenises the items differently"):
        diagnose_runs([str(runs / "karma"), str(copy)], num_items=16)


def test_heads_and_sizes_that_cannot_be_are_refused(runs: Path) -> None:
    run = str(runs / "karma")
    with pytest.raises(InputError, match=r"--layers: '9:1' is not in this model"):
        diagnose_runs([run], wanted=parse_heads("9:1"), num_items=16)
    with pytest.raises(InputError, match="--items: 2 is below 8"):
        diagnose_runs([run], num_items=2)


def test_heads_are_read_from_the_command_line() -> None:
    assert parse_heads("9:1,11:1, 3") == [(9, 1), (11, 1), (3, None)]
    for wrong in ("", "a", "1:", "1:2:3", "-1:0"):
        with pytest.raises(InputError, match="LAYER:HEAD"):
            parse_heads(wrong)


def test_the_job_prints_the_table_and_shows_the_heads_asked_for(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import runpy

    job = runpy.run_path(str(Path(__file__).resolve().parents[2] / "jobs" / "diagnose.py"))
    flags = ["--out", str(tmp_path), "--layers", "1", "--items", "16"]
    job["main"]([str(runs / "karma"), *flags])
    printed = capsys.readouterr().out
    assert "content sinks, %" in printed and "frozen" in printed
    assert printed.rstrip().endswith(f"report  {tmp_path}/diagnosis.html")
    metrics = json.loads((tmp_path / "diagnosis.json").read_text())["models"]["karma"]["metrics"]
    shown = {name for name in metrics if name.startswith("collapse/content_sink_")}
    assert shown == {f"collapse/content_sink_l1h{head}" for head in range(4)}

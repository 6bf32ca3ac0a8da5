"""The whole report on tiny runs: its keys, resume, what is chosen where, and refusals."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from karma_ray.artifacts import read_json, write_json
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError
from karma_ray.funnel.measure import _not_exposed, measure_funnel
from karma_ray.funnel.opened import KARMA, open_runs
from karma_ray.funnel.ranking import RankingRuns
from karma_ray.report.funnel_page import screen
from karma_ray.runs.executor import Executor
from karma_ray.runs.training import run_training
from karma_ray.runs.worker import TrainJob

TWO = ("recall", "prerank")
SMALL = (
    "ranking.width=4", "ranking.hidden=8", "ranking.attention_hidden=4", "ranking.epochs=0",
    "training.batch_size=8", "training.steps=4", "training.validate_every=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def report(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two seeds beside two action-only runs."""
    out = tmp_path_factory.mktemp("funnel") / "out"
    names = [str(runs / name) for name in ("karma-1", "karma-2")]
    beside = [str(runs / name) for name in ("action-1", "action-2")]
    measure_funnel(names, beside=beside, out=str(out), stages=TWO)
    return out


def test_the_report_has_stable_keys(report: Path) -> None:
    found = read_json(str(report / "funnel.json"))
    assert found["recall_metric"] == "HR@2%" and found["prerank_metric"] == "HR@10%"
    assert (found["recalled"], found["pool"], found["kept"]) == (5, 48, 5)
    ends = ("", ".low", ".high", ".users_low", ".users_high", ".p", ".seed_0", ".seed_1")
    for stage, metric in {"recall": "HR@2%", "prerank": "HR@10%"}.items():
        assert {f"{stage}/{metric}", f"{stage}/{metric}/action_only"} <= found.keys()
        for name in ("delta_action_only", "delta_none"):
            assert {f"{stage}/{name}{end}" for end in ends} <= found.keys()
            mean, low, high = (found[f"{stage}/{name}{end}"] for end in ends[:3])
            assert low <= mean <= high
            each = [found[f"{stage}/{name}.seed_{number}"] for number in (0, 1)]
            assert mean == pytest.approx(np.mean(each), abs=1e-5)
    assert found["recall/delta_none"] == pytest.approx(
        found["recall/union"] - found["recall/union/none"], abs=1e-5
    )
    assert found["recall/HR@2%/bm25"] >= 0 and 0 < found["prerank/pool"] <= 100
    assert found["labels"] == []


def test_the_page_and_the_screen_show_every_stage(report: Path, runs: Path) -> None:
    page = (report / "report.html").read_text()
    for text in ("Recall", "Pre-ranking", "HR@2%, list of h_t, exact", "karma-1", "+1.86"):
        assert text in page
    alone = str(report.parent / "alone")
    funnel, _ = measure_funnel([str(runs / "karma-1")], out=alone, stages=TWO)
    lines = screen(funnel).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    assert "Not compared with action-only training: name its runs with --beside." in lines


def test_outcomes_give_the_means_again(report: Path) -> None:
    found = read_json(str(report / "funnel.json"))
    table = pq.read_table(report / "outcomes.parquet").to_pandas()
    exact = table[(table.stage == "recall") & (table.metric == "exact") & (table.arm == "karma")]
    assert sorted(set(exact.run)) == ["karma-1", "karma-2"] and set(exact.seed) == {1, 2}
    each = exact.groupby("run")[["sum", "weight"]].sum()
    assert (each["sum"] / each["weight"]).mean() == pytest.approx(found["recall/HR@2%"], abs=1e-5)


def test_what_is_finished_is_not_measured_again(report: Path, runs: Path, tmp_path: Path) -> None:
    again = tmp_path / "out"
    shutil.copytree(report, again)
    part = next(again.glob("finished/recall-karma-1-*.parquet"))
    times = {path: path.stat().st_mtime_ns for path in again.glob("finished/*")}
    next(again.glob("finished/prerank-karma-2-*.json")).unlink()  # as if it was cut off there
    names = [str(runs / name) for name in ("karma-1", "karma-2")]
    beside = [str(runs / name) for name in ("action-1", "action-2")]
    measure_funnel(names, beside=beside, out=str(again), stages=TWO)
    assert read_json(f"{again}/funnel.json") == read_json(str(report / "funnel.json"))
    now = {path: path.stat().st_mtime_ns for path in again.glob("finished/*")}
    assert now.keys() == times.keys() and now[part] == times[part]
    changed = {path.name.split("-", 3)[2] for path in times if now[path] != times[path]}
    assert changed == {"2"}


def test_ranking_compares_models_of_the_same_seed(runs: Path, tmp_path: Path) -> None:
    """The run's seed is that of its CTR models, and of those that it is compared with."""

    def measured() -> dict[str, float]:
        measure_funnel(
            [str(runs / "karma-1")], beside=[str(runs / "action-2")], out=str(tmp_path / "out"),
            cache=str(tmp_path / "cache"), stages=("ranking",), ctr=SMALL,
        )  # fmt: skip
        return dict(read_json(str(tmp_path / "out" / "funnel.json")))

    found = measured()
    trained = {path.name.split("-seed")[0]: path for path in (tmp_path / "out/ranking").iterdir()
               if not path.is_symlink()}  # fmt: skip
    assert trained.keys() == {
        "none", "karma", "karma-interest", "action_only", "action_only-interest"
    }  # fmt: skip
    assert {read_json(f"{path}/config.json")["seed"] for path in trained.values()} == {1}
    for arm, name in {"none": "/none", "karma": "", "action_only": "/action_only"}.items():
        metrics = read_json(f"{trained[arm]}/metrics.json")
        for metric in ("AUC", "gAUC"):
            assert found[f"ranking/{metric}{name}"] == pytest.approx(metrics[metric], abs=1e-4)
    assert found["ranking/delta_none"] == pytest.approx(
        found["ranking/AUC"] - found["ranking/AUC/none"], abs=1e-4
    )
    shutil.rmtree(tmp_path / "out" / "ranking")  # finished parts need no CTR model any more
    assert measured() == found and not (tmp_path / "out" / "ranking").exists()


def test_an_executor_that_trains_is_given_the_models_of_ranking(
    runs: Path, source: PreparedData, tmp_path: Path
) -> None:
    given: list[tuple[str, int]] = []

    def elsewhere(job: TrainJob, max_failures: int) -> dict[str, Any]:
        given.append((job.stage, job.training.num_workers))
        return run_training(replace(job, training=replace(job.training, num_workers=0)))

    (like,) = open_runs([str(runs / "karma-1")], KARMA, source)
    executor = Executor(train=elsewhere)
    models = RankingRuns(source, str(tmp_path / "out"), str(tmp_path / "cache"), SMALL, executor)
    sums, _ = models.without(like)
    assert given == [("ctr", 1)] and "AUC" in sums.sums


def test_data_without_exposures_have_no_ranking_and_say_so(
    runs: Path, source: PreparedData, tmp_path: Path
) -> None:
    unexposed = PreparedData(source.uri, {**source.facts, "negative_source": "none"})
    assert "does not say what was shown" in str(_not_exposed(unexposed))
    assert _not_exposed(source) is None
    with pytest.raises(InputError, match="--stages: 'rank' is not valid; choices: recall"):
        measure_funnel([str(runs / "karma-1")], source.uri, stages=("rank",))


def test_unfinished_and_other_runs_are_refused(
    runs: Path, source: PreparedData, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"RUN: .* does not exist; `python jobs/train\.py --out"):
        measure_funnel([str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match=r"RUN: .* does not name its data; name them with --data"):
        measure_funnel([str(tmp_path)])
    with pytest.raises(InputError, match=r"RUN: .* is not a run folder: it has no config\.json"):
        measure_funnel([str(tmp_path)], source.uri)
    copy = tmp_path / "copy"
    shutil.copytree(runs / "karma-1", copy)
    shutil.rmtree(copy / "bundle")
    with pytest.raises(InputError, match="has no finished bundle/"):
        measure_funnel([str(copy)], source.uri)
    with pytest.raises(InputError, match="has no finished bundle/"):
        measure_funnel([str(runs / "karma-1")], source.uri, beside=[str(copy)])
    config = read_json(str(copy / "config.json"))
    write_json({**config, "recipe": "popularity"}, str(copy / "config.json"))
    with pytest.raises(InputError, match="is the floor or ceiling popularity"):
        measure_funnel([str(copy)], source.uri)


def test_equal_names_are_told_apart(runs: Path, source: PreparedData, tmp_path: Path) -> None:
    shutil.copytree(runs / "action-1", tmp_path / "karma-1")
    opened = open_runs([str(tmp_path / "karma-1")], "action_only", source, taken=["karma-1"])
    assert [one.name for one in opened] == ["karma-1 (2)"]
    twice = open_runs([str(runs / "karma-1")] * 2, "karma", source)
    assert [one.name for one in twice] == ["karma-1"]


def test_a_run_of_another_catalogue_is_refused(
    runs: Path, source: PreparedData, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs / "karma-1", copy)
    manifest = read_json(str(copy / "item_embeddings" / "manifest.json"))
    manifest["parents"]["items"] = "another"
    write_json(manifest, str(copy / "item_embeddings" / "manifest.json"))
    with pytest.raises(InputError, match=r"RUN: .* has vectors of another catalogue than"):
        measure_funnel([str(copy)], source.uri)


def test_runs_of_other_training_data_are_refused(
    runs: Path, source: PreparedData, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs / "action-1", copy)
    manifest = read_json(str(copy / "manifest.json"))
    write_json({**manifest, "parents": {"data": "other"}}, str(copy / "manifest.json"))
    with pytest.raises(InputError, match=r"--beside: .* was trained on other data than"):
        measure_funnel([str(runs / "karma-1")], source.uri, beside=[str(copy)])


def test_a_run_of_another_split_is_refused(
    runs: Path, source: PreparedData, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs / "karma-1", copy)
    config = read_json(str(copy / "config.json"))
    config["prepare"]["test_share"] = 0.2
    write_json(config, str(copy / "config.json"))
    with pytest.raises(InputError, match=r"RUN: .* was trained with prepare\.test_share=0\.2"):
        measure_funnel([str(copy)], source.uri)


def test_pairs_that_cannot_be_made_are_refused(runs: Path, source: PreparedData) -> None:
    names = [str(runs / name) for name in ("karma-1", "karma-2")]
    with pytest.raises(InputError, match="name one for each RUN"):
        measure_funnel(names, source.uri, beside=[str(runs / "action-1")])
    with pytest.raises(InputError, match="is one of the runs that it would be beside"):
        measure_funnel(names, source.uri, beside=names[:1])
    with pytest.raises(InputError, match="--clicks: 0"):
        measure_funnel(names, source.uri, num_clicks=0)

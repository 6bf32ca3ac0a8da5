"""An evaluation by several processes gives what one gives, and is divided only if it is long."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from karma_ray import recipes
from karma_ray.artifacts import RunFolder, read_json, write_json
from karma_ray.config import Config, override, to_dict
from karma_ray.data.prepared import PreparedData
from karma_ray.evaluation.outcomes import FILES
from karma_ray.model.device import may_use_gpus
from karma_ray.runs import evaluation_shares
from karma_ray.runs.assessment import assess
from karma_ray.runs.evaluation_shares import Enlist, Share
from karma_ray.runs.executor import Executor
from karma_ray.runs.pipeline import evaluate_run, train_run
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.runs.stages import finished_stage
from tests.tiny_run import SMALL_STUDY

SETTINGS = (
    *SMALL_STUDY, "training.num_workers=0", "training.validate_every=0",
    "evaluation.max_examples=30", "evaluation.block_size=8",
)  # fmt: skip


class Run:
    """A small run without metrics, and its evaluations."""

    def __init__(self, shop: str, folder: Path) -> None:
        words = folder / "words.tsv"
        words.write_text("phrase\tparaphrase\nlamp\tlight\nrug\tcarpet\nshirt\tblouse\n")
        self.config: Config = override(
            recipes.build("toy"), [*SETTINGS, f"evaluation.paraphrases={words}"]
        )
        self.source: PreparedData = ensure_prepared(shop, self.config.prepare)
        self.run = str(folder / "run")
        train_run(self.config, shop, self.run, cache=str(folder / "cache"), is_tested=False)

    def assessed(self, out: Path, enlist: Enlist, cache: Path | None = None) -> dict[str, Any]:
        """What an evaluation finds, with the content of its files; `cache` may know the floors."""
        stage, known = finished_stage(self.run, self.source.items_uri), str(cache or out)
        found = assess(self.config, self.source, self.run, stage, known, str(out), enlist)
        outcomes = [Path(out, "outcomes", name).read_bytes() for name in FILES]
        return {"metrics": found, "outcomes": outcomes, "floors": read_json(f"{out}/floors.json")}


def nobody(share: Share, most: int, bundle: str, later: int) -> Sequence[Iterator[Any]]:
    raise AssertionError("the evaluation is short")


@pytest.fixture(scope="module")
def run(shop: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(shop, tmp_path_factory.mktemp("shares"))


@pytest.fixture(scope="module")
def alone(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What this process finds by itself, as an evaluation that is short asks nobody else."""
    folder = tmp_path_factory.mktemp("alone")
    return {**run.assessed(folder, nobody), "cache": folder}


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every evaluation takes long enough to be divided."""
    monkeypatch.setattr(evaluation_shares, "SHARE_SECONDS", 1e-4)
    monkeypatch.setattr(evaluation_shares, "SOME_SECONDS", 1e-3)


def test_three_processes_find_what_one_finds(
    run: Run, alone: dict[str, Any], long: None, tmp_path: Path
) -> None:
    asked: list[tuple[int, int]] = []

    def enlist(share: Share, most: int, bundle: str, later: int) -> Sequence[Iterator[Any]]:
        asked.append((most, later))
        assert Path(bundle, "manifest.json").exists()
        return [share(1, 3), share(2, 3)]

    assert {**run.assessed(tmp_path, enlist), "cache": alone["cache"]} == alone
    assert (
        asked[0][0] > 2 and asked[0][1] == 0 and alone["metrics"]["paraphrased/share_rewritten"] > 0
    )
    assert {"popularity", "tfidf", "oracle"} <= alone["floors"].keys()


def with_workers(run: Run, folder: Path, workers: int = 1) -> str:
    """A copy of the run as if so many workers had trained it."""
    config = override(run.config, [f"training.num_workers={workers}"])
    shutil.copytree(run.run, folder)
    write_json(to_dict(config), RunFolder(str(folder)).config)
    return str(folder)


def test_a_finished_run_is_evaluated_again_where_the_executor_does_so(
    run: Run, alone: dict[str, Any], long: None, tmp_path: Path
) -> None:
    places: list[tuple[str, bool]] = []

    def elsewhere(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        places.append(("elsewhere", may_use_gpus()))
        return measure()

    def enlist(share: Share, most: int, bundle: str, later: int) -> Sequence[Iterator[Any]]:
        places.append(("divided", most > 0))
        return [share(1, 2)]

    executor = Executor(measure=elsewhere, enlist=enlist)
    again, cache = with_workers(run, tmp_path / "again"), str(alone["cache"])
    folder, found = evaluate_run(again, cache=cache, executor=executor)
    assert (folder, found) == (again, {**alone["metrics"], "seconds": None})
    assert places == [("elsewhere", True), ("divided", True)]
    assert evaluate_run(run.run, cache=cache, executor=executor)[1] == found  # without workers
    assert len(places) == 2


def test_a_short_evaluation_starts_no_ray(
    run: Run, alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from karma_ray.cluster import measuring
    from karma_ray.cluster.executor import ON_RAY

    def starts() -> None:
        raise AssertionError("Ray is started")

    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(measuring.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(measuring, "connect", starts)
    again = with_workers(run, tmp_path / "again")
    _, found = evaluate_run(again, cache=str(alone["cache"]), executor=ON_RAY)
    assert found == {**alone["metrics"], "seconds": None}


def test_machines_are_started_for_an_evaluation_that_takes_longer_than_that(
    run: Run, alone: dict[str, Any], long: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def enlist(share: Share, most: int, bundle: str, later: int) -> Sequence[Iterator[Any]]:
        asked.append(later)
        return []

    monkeypatch.setattr(evaluation_shares, "GROWN_SECONDS", 0.0)
    again, cache = with_workers(run, tmp_path / "again", workers=3), str(alone["cache"])
    evaluate_run(again, cache=cache, executor=Executor(enlist=enlist))
    assert asked == [2]  # and this process: as many as have trained


@pytest.mark.ray
def test_a_task_of_ray_ranks_what_is_left_to_it(
    two_cpus: None, run: Run, alone: dict[str, Any], long: None, tmp_path: Path
) -> None:
    from karma_ray.cluster.measuring import enlist_on_ray

    started: list[int] = []

    def enlist(share: Share, most: int, bundle: str, later: int) -> Sequence[Iterator[Any]]:
        others = enlist_on_ray(share, 1, bundle)
        started.append(len(others))
        return others

    found = run.assessed(tmp_path, enlist, alone["cache"])
    assert {**found, "cache": alone["cache"]} == alone
    assert started == [1]

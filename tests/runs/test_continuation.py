"""A finished run's model is trained further: on the same shop, and on one with new items."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from karma_ray import recipes
from karma_ray.artifacts import read_json, read_lines, read_manifest
from karma_ray.config import Config, override
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.errors import InputError

pytestmark = pytest.mark.usefixtures("blank_pictures")

SMALL = [
    "pretrain.steps=20", "warmup.steps=20", "training.steps=60", "training.batch_size=8",
    "training.report_every=1", "training.encoder_delay=0.5", "training.num_workers=0",
    "training.threads_per_worker=1", "evaluation.max_examples=30",
    "objective.hard_ramp=0",  # losses of the first and the last steps are then comparable
]  # fmt: skip


def _config(*more: str) -> Config:
    return override(recipes.build("toy"), [*SMALL, *more])


def _losses(run: str, name: str = "total") -> list[float]:
    lines = read_lines(f"{run}/metrics.jsonl")
    return [line[f"loss/{name}"] for line in lines if line["stage"] == "joint"]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folder and run of a first training."""
    from karma_ray.runs.pipeline import train_run

    root = str(tmp_path_factory.mktemp("first"))
    write_toy_shop(f"{root}/shop", ToyShopConfig(num_items=240, num_users=120))
    train_run(_config(), f"{root}/shop", f"{root}/run", cache=f"{root}/cache", is_tested=False)
    return root, f"{root}/run"


def _train(root: str, run: str, *more: str, is_tested: bool = False, **options: Any) -> None:
    from karma_ray.runs.pipeline import train_run

    shop = options.pop("shop", f"{root}/shop")
    train_run(
        _config("training.steps=3", *more), shop, run, cache=f"{root}/cache", is_tested=is_tested,
        **options,
    )  # fmt: skip


def test_the_first_loss_is_about_the_last_one_of_the_run_it_goes_on_from(
    parent: tuple[str, str], tmp_path: Path
) -> None:
    root, first = parent
    run = str(tmp_path / "run")
    _train(root, run, init_from=first)
    for name in ("total", "action", "generation"):
        before, after = _losses(first, name), _losses(run, name)
        assert _mean(before[-10:]) < 0.75 * before[0]
        assert after[0] == pytest.approx(_mean(before[-10:]), rel=0.2)  # one batch
    stages = {line["stage"] for line in read_lines(f"{run}/metrics.jsonl")}
    assert stages == {"joint", "valid"}  # neither pretraining nor warm-up
    made = read_manifest(f"{run}", "run")["parents"]
    assert made["init"] == read_manifest(f"{first}/bundle")["content_hash"]
    assert read_json(f"{run}/config.json")["training"]["encoder_delay"] == 0
    # Finished, it is measured again, and it is a start for the next one.
    from karma_ray.runs.pipeline import evaluate_run

    assert evaluate_run(run, cache=f"{root}/cache")[1]["num_test"] == 30
    _train(root, run, init_from=first, resume=True, is_tested=True)
    with pytest.raises(InputError, match=r"is not what .* was started from"):
        _train(root, run, init_from=run, resume=True)


def test_new_items_in_the_catalogue_are_no_obstacle(
    parent: tuple[str, str], tmp_path: Path
) -> None:
    root, first = parent
    shop, run = str(tmp_path / "shop"), str(tmp_path / "run")
    write_toy_shop(shop, ToyShopConfig(num_items=300, num_users=60, seed=1))
    _train(root, run, init_from=first, shop=shop)
    assert read_manifest(f"{run}/item_embeddings")["content_hash"]
    assert _losses(run, "generation")[0] < 0.85 * _losses(first, "generation")[0]


def test_a_run_that_was_cut_off_goes_on_from_its_own_checkpoint(
    parent: tuple[str, str], tmp_path: Path, cut_off: Callable[[], AbstractContextManager[None]]
) -> None:
    root, first = parent
    more = ("training.checkpoint_every=2", "training.steps=4")
    _train(root, str(tmp_path / "whole"), *more, init_from=first)
    with cut_off():
        _train(root, str(tmp_path / "cut"), *more, init_from=first)
    # Another way of execution, and RUN need not be named again: start.json knows it.
    changed = ("training.checkpoint_every=1", "training.encoder_delay=0")
    _train(root, str(tmp_path / "cut"), *more, *changed, resume=True)
    assert _losses(str(tmp_path / "cut")) == _losses(str(tmp_path / "whole"))
    parents = read_manifest(str(tmp_path / "cut"), "run")["parents"]
    assert parents["init"] == read_manifest(f"{first}/bundle")["content_hash"]


def test_another_model_is_refused_by_field_and_values(
    parent: tuple[str, str], tmp_path: Path
) -> None:
    message = r"model\.score\.scale: 3\.0 differs from .* of the run to continue"
    with pytest.raises(InputError, match=message):
        _train(parent[0], str(tmp_path / "x"), "model.score.scale=3", init_from=parent[1])


def test_an_unfinished_run_is_refused(parent: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(InputError, match=r"--init-from: .* is not a finished run: it has no check"):
        _train(parent[0], str(tmp_path / "x"), init_from=str(tmp_path / "run"))


def test_the_job_takes_the_configuration_of_the_run(
    parent: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs.train import main

    flags = ["--data", f"{parent[0]}/shop", "--init-from", parent[1], "--set", "training.steps=1"]
    main([*flags, "--out", str(tmp_path / "run")])
    assert "HR@" in capsys.readouterr().out
    assert read_json(f"{tmp_path}/run/config.json")["training"]["batch_size"] == 8

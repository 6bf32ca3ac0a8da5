"""Lost workers and several workers, end to end. Minutes: run before a release."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from karma_ray import recipes
from karma_ray.artifacts import read_lines
from karma_ray.cluster.training import run_training
from karma_ray.cluster.worker import TrainJob
from karma_ray.config import override
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.training.parallel import rank
from karma_ray.training.step import StepOutput
from tests.cluster import test_training as small

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def _killing_step(marker: str, at: int, model: nn.Module, batch: Any) -> StepOutput:
    """The last worker kills itself, as a lost machine would, in its step `at`; once."""
    if rank() == 1:
        with open(marker, "a") as steps:
            steps.write(".")
        if os.path.getsize(marker) == at:
            os.kill(os.getpid(), signal.SIGKILL)
    return small._step(model, batch)


def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(
    ray_cluster: None, tmp_path: Path, rows: str
) -> None:
    def job(run: str) -> TrainJob:
        return small._job(tmp_path / run, rows, steps=16, checkpoint_every=5, num_workers=2)

    run_training(job("whole"), progress=False)
    marker = str(tmp_path / "steps")
    step = partial(_killing_step, marker, 13)
    summary = run_training(replace(job("cut"), step=step), max_failures=1, progress=False)
    assert os.path.getsize(marker) == 13 + (16 - 10)  # from the checkpoint, not from the start
    assert summary["steps"] == 16
    whole, cut = small._losses(tmp_path / "whole"), small._losses(tmp_path / "cut")
    assert list(cut.values()) == pytest.approx(list(whole.values()), rel=1e-5)


def test_karma_on_two_workers_ends_where_one_ends(ray_cluster: None, tmp_path: Path) -> None:
    from karma_ray.cluster.pipeline import train_run

    shop = str(tmp_path / "shop")
    write_toy_shop(shop, ToyShopConfig(num_items=240, num_users=120))
    found: dict[int, dict[int, float]] = {}
    metrics: dict[int, dict[str, Any]] = {}
    for workers in (1, 2):
        config = override(
            recipes.build("toy"),
            ["pretrain.steps=20", "warmup.steps=20", "training.steps=20", "training.batch_size=8",
             "training.report_every=1", "training.encoder_delay=0.5", "training.precision=float32",
             # Each worker draws for itself; with all negatives and steps there is nothing to draw.
             "collate.num_hard_negatives=16", "collate.num_decoded=21", "collate.drop_query=0",
             f"training.num_workers={workers}", "evaluation.max_examples=60"],
        )  # fmt: skip
        run = str(tmp_path / f"run-{workers}")
        metrics[workers] = train_run(config, shop, run, cache=str(tmp_path / "cache"))
        lines = [line for line in read_lines(f"{run}/metrics.jsonl") if line["stage"] == "joint"]
        found[workers] = {line["step"]: line["loss/total"] for line in lines}
    assert list(found[2]) == list(range(1, 21))
    # Float sums in another order, carried through three stages.
    assert list(found[2].values()) == pytest.approx(list(found[1].values()), rel=0.01)
    assert metrics[2]["HR@50"] == pytest.approx(metrics[1]["HR@50"], abs=5.0)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """The linear rows of the small job."""
    return small.write_rows(tmp_path)

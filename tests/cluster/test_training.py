"""One tiny regression through `run_training`: in this process, and on Ray with 1 and 2 workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from karma_ray.artifacts import read_lines
from karma_ray.cluster.training import run_training
from karma_ray.data.draws import uniform
from karma_ray.errors import InputError, NonFiniteLoss
from karma_ray.runs.batches import Collate, WorkerContext, stream_batches
from karma_ray.runs.worker import TrainJob
from karma_ray.training.checkpoints.checkpoint import load_weights
from karma_ray.training.config import TrainingConfig
from karma_ray.training.order import Order, Source
from karma_ray.training.parallel import global_sum
from karma_ray.training.step import StepOutput

TRAINING = TrainingConfig(
    steps=24,
    batch_size=8,
    learning_rate=0.2,
    precision="float32",
    report_every=1,
    checkpoint_every=10,
    num_workers=0,
)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """50 rows of a linear function."""
    return write_rows(tmp_path)


def write_rows(folder: Path) -> str:
    """The rows as a table of several row groups."""
    inputs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    target = inputs @ np.array([1.0, -2.0, 0.5], dtype=np.float32)
    table = pa.table({"input": inputs.tolist(), "target": target.tolist()})
    (folder / "rows").mkdir()
    pq.write_table(table, folder / "rows" / "part.parquet", row_group_size=8)
    return str(folder / "rows")


def _build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def _make_collator() -> Collate:
    def collate(rows: pa.Table, keys: np.ndarray) -> tuple[Tensor, Tensor]:
        # The noise shows that a resumed stream draws the same random numbers.
        noise = 0.01 * uniform(keys[:, None], np.arange(3))
        inputs = torch.tensor(rows.column("input").to_pylist()) + torch.from_numpy(noise).float()
        return inputs, torch.tensor(rows.column("target").to_pylist())[:, None]

    return collate


def _make_quiet_collator() -> Collate:
    def collate(rows: pa.Table, keys: np.ndarray) -> tuple[Tensor, Tensor]:
        inputs = torch.tensor(rows.column("input").to_pylist())
        return inputs, torch.tensor(rows.column("target").to_pylist())[:, None]

    return collate


def _batches(data: str, make_collator: Any, context: WorkerContext) -> Iterator[Any]:
    order = Order(Source.scan(data), 5, 8, context.rank, context.num_workers)
    return stream_batches(
        order,
        make_collator,
        start_step=context.start_step,
        steps=context.steps,
        read_blocks=context.read_blocks,
    )


def _step(model: nn.Module, batch: tuple[Tensor, Tensor], *_: object) -> StepOutput:
    inputs, target = batch
    error = (model(inputs) - target).square().sum()
    loss = error / global_sum(torch.tensor(float(len(inputs))))
    return StepOutput(loss, {"loss/square": global_sum(loss), "examples": len(inputs)})


def _broken_step(model: nn.Module, batch: tuple[Tensor, Tensor], *_: object) -> StepOutput:
    fine = _step(model, batch)
    return StepOutput(fine.loss, {"loss/generation": fine.loss / 0.0})


def _norm(model: nn.Module, step: int) -> dict[str, float]:
    return {"norm": sum(parameter.norm().item() for parameter in model.parameters())}


def _job(run: Path, data: str, **changes: Any) -> TrainJob:
    training = replace(TRAINING, **changes)
    batches = partial(_batches, data, _make_quiet_collator)
    return TrainJob(str(run), "joint", _build, _step, batches, training, validate=_norm)


def _losses(run: Path) -> dict[int, float]:
    lines = read_lines(str(run / "metrics.jsonl"))
    return {line["step"]: line["loss/square"] for line in lines if line["stage"] == "joint"}


def test_without_workers_it_trains_in_this_process_and_leaves_a_run(
    tmp_path: Path, rows: str
) -> None:
    run = tmp_path / "run"
    summary = run_training(_job(run, rows), progress=False)
    losses = _losses(run)
    assert list(losses) == list(range(1, 25))
    assert losses[24] < 0.2 * losses[1]
    assert summary["steps"] == 24
    assert list(run.glob("events.out.tfevents.*"))
    model = nn.Linear(3, 1)
    load_weights(summary["weights"], model)
    assert summary["valid"]["norm"] == pytest.approx(_norm(model, 24)["norm"])
    (valid,) = [line for line in read_lines(str(run / "metrics.jsonl")) if line["stage"] == "valid"]
    assert valid["step"] == 24


def test_an_interrupted_run_continues_as_if_nothing_had_happened(tmp_path: Path, rows: str) -> None:
    def job(run: Path, step: Any) -> TrainJob:
        batches = partial(_batches, rows, _make_collator)
        return TrainJob(str(run), "joint", _build, step, batches, TRAINING)

    run_training(job(tmp_path / "whole", _step), progress=False)
    calls = iter(range(100))

    def interrupted(model: nn.Module, batch: Any, *_: object) -> StepOutput:
        if next(calls) == 15:
            raise KeyboardInterrupt
        return _step(model, batch)

    with pytest.raises(KeyboardInterrupt):
        run_training(job(tmp_path / "cut", interrupted), progress=False)
    with pytest.raises(InputError, match="already holds checkpoints"):
        run_training(job(tmp_path / "cut", _step), progress=False)
    run_training(job(tmp_path / "cut", _step), resume=True, progress=False)
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "cut/checkpoints/joint").glob("step-*"))
    assert names == ["step-0000010", "step-0000020"]


def test_a_finished_stage_is_not_trained_again(tmp_path: Path, rows: str) -> None:
    summary = run_training(_job(tmp_path / "run", rows), progress=False)
    assert run_training(_job(tmp_path / "run", rows), resume=True, progress=False) == summary


def test_a_loss_that_is_not_finite_stops_the_stage(tmp_path: Path, rows: str) -> None:
    job = replace(_job(tmp_path / "run", rows), step=_broken_step)
    with pytest.raises(NonFiniteLoss, match="loss/generation is not finite at step 1"):
        run_training(job, progress=False)
    assert (tmp_path / "run/failures/joint/step-0000001-worker-0/batch.safetensors").exists()


def test_early_stopping_ends_the_stage(tmp_path: Path, rows: str) -> None:
    job = replace(_job(tmp_path / "run", rows), should_stop=lambda record: record["step"] >= 7)
    assert run_training(job, progress=False)["steps"] == 7


@pytest.mark.ray
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ray_workers_train_like_this_process(
    ray_cluster: None, tmp_path: Path, rows: str, workers: int
) -> None:
    # Two epochs and a checkpoint: short, because a report waits for the controller's next poll.
    short = {"steps": 10, "checkpoint_every": 5}
    run_training(_job(tmp_path / "plain", rows, **short), progress=False)
    job = _job(tmp_path / "ray", rows, num_workers=workers, **short)
    summary = run_training(job, progress=False)
    plain, ray = _losses(tmp_path / "plain"), _losses(tmp_path / "ray")
    assert list(ray) == list(plain)
    tolerance = 0.0 if workers == 1 else 1e-4
    assert list(ray.values()) == pytest.approx(list(plain.values()), rel=tolerance, abs=1e-7)
    assert summary["steps"] == 10
    assert (tmp_path / "ray/checkpoints/joint/step-0000010/checkpoint.json").exists()
    (start,) = read_lines(str(tmp_path / "ray/starts.jsonl"))
    assert (start["stage"], start["step"], len(start["machines"])) == ("joint", 0, workers)


@pytest.mark.ray
def test_a_loss_that_is_not_finite_on_ray_reaches_the_driver_by_name(
    ray_cluster: None, tmp_path: Path, rows: str
) -> None:
    job = replace(_job(tmp_path / "run", rows, num_workers=2), step=_broken_step)
    with pytest.raises(NonFiniteLoss, match="loss/generation is not finite at step 1"):
        run_training(job, progress=False)

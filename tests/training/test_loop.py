from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from karma_ray.artifacts import read_json
from karma_ray.errors import NonFiniteLoss
from karma_ray.training.loop import Record, fit, without_bars
from karma_ray.training.optim import build_optimizer
from karma_ray.training.step import StepOutput

Batch = tuple[Tensor, Tensor]


def _batches(count: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.tensor([[1.0], [-2.0], [0.5]])
    inputs = [torch.randn(8, 3, generator=generator) for _ in range(count)]
    return [(rows, rows @ truth) for rows in inputs]


def _step(model: nn.Module, batch: Batch, *_: object) -> StepOutput:
    rows, target = batch
    loss = nn.functional.mse_loss(model(rows).float(), target)
    return StepOutput(loss, {"loss/square": loss, "examples": len(rows), "tokens": rows.numel()})


def _start() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, build_optimizer(model, learning_rate=0.1, weight_decay=0.0)


def test_a_list_of_batches_and_an_append_train_a_model() -> None:
    model, optimizer = _start()
    records: list[Record] = []
    done = fit(
        model,
        _step,
        optimizer,
        _batches(60),
        records.append,
        steps=60,
        precision="float32",
        report_every=20,
    )
    assert done == 60
    assert [record["step"] for record in records] == [20, 40, 60]
    assert records[-1]["loss/square"] < 0.1 * records[0]["loss/square"]
    assert records[-1]["loss/total"] == records[-1]["loss/square"]


def test_reports_hold_means_speed_rate_and_waiting() -> None:
    model, optimizer = _start()
    records: list[Record] = []
    fit(model, _step, optimizer, _batches(4), records.append, steps=4, report_every=2)
    first = records[0]
    assert first["examples"] == 8
    assert first["tokens_per_s"] == pytest.approx(3 * first["examples_per_s"])
    assert first["examples_per_s"] == pytest.approx(8 * first["steps_per_s"])
    assert first["lr"] == pytest.approx(0.1, rel=0.5)
    assert first["grad_norm"] > 0
    assert 0 <= first["data_wait_share"] <= 1


def test_the_reported_loss_is_the_mean_over_the_steps_since_the_last_report() -> None:
    losses: list[float] = []

    def recording(model: nn.Module, batch: Batch, *_: object) -> StepOutput:
        output = _step(model, batch)
        losses.append(output.loss.item())
        return output

    model, optimizer = _start()
    records: list[Record] = []
    fit(model, recording, optimizer, _batches(5), records.append, steps=5, report_every=3)
    assert records[0]["loss/total"] == pytest.approx(sum(losses[:3]) / 3)
    assert records[1]["loss/total"] == pytest.approx(sum(losses[3:]) / 2)


def test_a_shorter_stream_ends_the_training_with_a_report() -> None:
    model, optimizer = _start()
    records: list[Record] = []
    assert fit(model, _step, optimizer, _batches(3), records.append, steps=9, report_every=2) == 3
    assert [record["step"] for record in records] == [2, 3]


def test_a_true_answer_to_a_report_ends_the_training() -> None:
    model, optimizer = _start()
    done = fit(
        model,
        _step,
        optimizer,
        _batches(9),
        lambda record: record["step"] >= 4,
        steps=9,
        report_every=2,
    )
    assert done == 4


def test_how_often_a_run_reports_does_not_change_what_its_dropout_draws() -> None:
    def probe(model: nn.Module, batch: Batch, *_: object) -> Record:
        return {"mean": float(model(batch[0]).mean())}

    def weights(report_every: int) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
        optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.0)
        fit(
            model, _step, optimizer, _batches(6), lambda _: None, steps=6, precision="float32",
            report_every=report_every, probe=probe,
        )  # fmt: skip
        return next(model.parameters()).detach()

    assert torch.equal(weights(1), weights(6))


def test_after_step_sees_every_finished_step() -> None:
    model, optimizer = _start()
    seen: list[int] = []
    fit(
        model,
        _step,
        optimizer,
        _batches(3),
        lambda record: None,
        steps=5,
        start_step=2,
        after_step=seen.append,
    )
    assert seen == [3, 4, 5]


def test_a_large_gradient_is_clipped_to_the_bound() -> None:
    model, optimizer = _start()
    huge = [(1e4 * rows, target) for rows, target in _batches(1)]
    fit(
        model,
        _step,
        optimizer,
        huge,
        lambda r: None,
        steps=1,
        grad_clip=0.5,
        precision="float32",
    )
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert float(torch.stack(norms).norm()) == pytest.approx(0.5, rel=1e-3)


def test_a_term_that_is_not_finite_is_named_and_its_batch_saved(tmp_path: Path) -> None:
    def step(model: nn.Module, batch: Batch, *_: object) -> StepOutput:
        fine = _step(model, batch)
        broken = fine.loss * float("nan") if batch[0].max() > 100 else fine.loss
        logs = {"loss/action": fine.loss, "loss/generation": broken}
        return StepOutput(fine.loss + broken, logs)

    def stream() -> Iterator[Batch]:
        yield from _batches(2)
        yield torch.full((8, 3), 101.0), torch.zeros(8, 1)

    model, optimizer = _start()
    with pytest.raises(NonFiniteLoss, match=r"loss/generation is not finite at step 3.*saved to"):
        fit(model, step, optimizer, stream(), print, steps=3, failure_dir=str(tmp_path))
    folder = tmp_path / "step-0000003-worker-0"
    assert load_file(folder / "batch.safetensors")["0"].eq(101.0).all()
    assert read_json(str(folder / "logs.json"))["loss/action"] > 0


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone() -> None:
    def step(model: nn.Module, batch: Batch, *_: object) -> StepOutput:
        # sqrt has a finite value and an infinite slope at 0.
        return StepOutput(model(torch.zeros_like(batch[0])).sub(model.bias).sum().abs().sqrt(), {})

    model, optimizer = _start()
    before = model.weight.detach().clone()
    with pytest.raises(NonFiniteLoss, match="gradient norm"):
        fit(model, step, optimizer, _batches(1), print, steps=1, precision="float32")
    assert torch.equal(before, model.weight)


def test_a_bar_is_drawn_unless_another_process_tells_of_the_training(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def drawn() -> str:
        model, optimizer = _start()
        fit(model, _step, optimizer, _batches(2), [].append, steps=2, progress=True)
        return capsys.readouterr().err

    with without_bars():
        assert drawn() == ""
    assert "2/2" in drawn()

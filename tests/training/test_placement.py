"""Sharded layers, recomputed activations and compiled layers change nothing but the cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from karma_ray.data.batch import Batch
from karma_ray.model.karma import KarmaModel
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.checkpoints.shards import is_sharded, local_part, whole
from karma_ray.training.config import TrainingConfig
from karma_ray.training.loop import fit
from karma_ray.training.optim import build_optimizer
from karma_ray.training.parallel import global_sum, sum_gradients
from karma_ray.training.placement import bodies, clip_gradients, needs_all_workers, place
from karma_ray.training.step import JointStep
from tests import pictures, tiny, top_layers
from tests.gloo import run_workers

CPU = torch.device("cpu")
ROWS = [
    tiny.window(["i0", "i1", "i2"], [0, 0, 1], hard=[["i9", "i1"], ["i8"], []], user="a"),
    tiny.window(["i5", "copy"], queries=[None, "mug"], user="b"),
    tiny.window(["i1", "i5"], hard=[["i0"], ["i7", "i6"]], user="d"),
]
STEPS = {
    "whole": JointStep(ObjectiveConfig()),
    "parts": JointStep(ObjectiveConfig(), micro_batch_size=1, micro_tokens=20),
}
IMAGES = JointStep(ObjectiveConfig(lambda_img=0.5))


def _batch(rows: slice = slice(None)) -> Batch:
    return tiny.batch(tiny.sequences(*ROWS[rows]))


def _pictured(rows: slice = slice(None)) -> Batch:
    return pictures.batch(tiny.sequences(*ROWS[rows]), first=rows.start or 0)


def _gradients(step: JointStep, model: KarmaModel, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    output = step(model, batch)
    if output.loss.requires_grad:
        output.loss.backward()
    sum_gradients(model.parameters())
    found = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": global_sum(output.loss)}


def _trained(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Weights after three optimiser steps."""
    optimizer = build_optimizer(model, learning_rate=1e-3)
    fit(model, STEPS["whole"], optimizer, [batch] * 3, lambda record: None, steps=3,
        grad_clip=0.5, precision="float32", report_every=3)  # fmt: skip
    return {name: whole(value).clone() for name, value in model.named_parameters()}


def _worker(rank: int) -> dict[str, Any]:
    share = (slice(0, 2), slice(2, 3))[rank]
    batch = _batch(share)
    training = TrainingConfig(parallelism="shard", activation_checkpointing=True)
    model = place(tiny.model().train(), training, CPU)
    assert needs_all_workers(model)
    found: dict[str, Any] = {name: _gradients(step, model, batch) for name, step in STEPS.items()}
    pictured = place(pictures.model().train(), training, CPU)
    found["images"] = _gradients(IMAGES, pictured, _pictured(share))
    split = [value for value in model.parameters() if is_sharded(value)]
    found["share"] = sum(local_part(p).numel() for p in split) / sum(p.numel() for p in split)
    found["norm"] = clip_gradients(model, 1e-3)
    found["clipped"] = clip_gradients(model, 1.0)
    found["trained"] = _trained(model, batch)
    return found


@pytest.fixture(scope="module")
def sharded() -> list[dict[str, Any]]:
    """What two workers with sharded layers found."""
    return run_workers(_worker, 2)


@pytest.mark.parametrize("name", list(STEPS))
def test_sharded_layers_give_the_loss_and_gradients_of_one_worker(
    sharded: list[dict[str, Any]], name: str
) -> None:
    wanted = _gradients(STEPS["whole"], tiny.model(), _batch())
    for found in sharded:
        torch.testing.assert_close(found[name], wanted, atol=1e-5, rtol=1e-4)
        assert found["share"] == pytest.approx(0.5, abs=0.05)


def test_sharded_layers_leave_the_visual_term_as_it_is(sharded: list[dict[str, Any]]) -> None:
    wanted = _gradients(IMAGES, pictures.model(), _pictured())
    for found in sharded:
        torch.testing.assert_close(found["images"], wanted, atol=1e-5, rtol=1e-4)


def test_sharded_gradients_are_clipped_by_the_norm_of_the_whole(
    sharded: list[dict[str, Any]],
) -> None:
    model = tiny.model()
    _gradients(STEPS["whole"], model, _batch())
    norm = clip_gradients(model, 1e-3)
    for found in sharded:
        torch.testing.assert_close(found["norm"], norm, atol=1e-5, rtol=1e-4)
        assert float(found["clipped"]) == pytest.approx(1e-3, rel=1e-3)


def test_sharded_training_ends_with_the_weights_of_one_worker(
    sharded: list[dict[str, Any]],
) -> None:
    wanted = _trained(place(tiny.model(), TrainingConfig(), CPU), _batch())
    for found in sharded:
        # Adam's first steps are signs: where a gradient is rounding noise they may differ.
        close = [torch.isclose(found["trained"][n], w, atol=1e-4) for n, w in wanted.items()]
        assert torch.cat([part.flatten() for part in close]).float().mean() > 0.999


def _top_worker(rank: int, folder: str) -> dict[str, Any]:
    batch = _batch((slice(0, 2), slice(2, 3))[rank])
    found: dict[str, Any] = {}
    for kind in ("replicate", "shard"):
        karma = top_layers.model().train()
        table = top_layers.states(karma, Path(folder, "states.npy"))
        model = place(karma, TrainingConfig(parallelism=kind, activation_checkpointing=True), CPU)
        for name, step in STEPS.items():
            model.interest.item_encoder.states = table
            found[f"{kind} {name}"] = _gradients(step, model, batch)
            model.interest.item_encoder.states = None
            found[f"{kind} {name} live"] = _gradients(step, model, batch)
    return found


def test_many_workers_train_the_top_layers_as_one_does(tmp_path: Path) -> None:
    karma = top_layers.model()
    karma.interest.item_encoder.states = top_layers.states(karma, tmp_path / "states.npy")
    wanted = _gradients(STEPS["whole"], karma, _batch())
    for found in run_workers(_top_worker, 2, str(tmp_path)):
        assert len(found) == 8
        for gradients in found.values():
            torch.testing.assert_close(gradients, wanted, atol=1e-5, rtol=1e-4)


def test_recomputed_activations_are_the_activations() -> None:
    plain = _gradients(STEPS["whole"], tiny.model().train(), _batch())
    training = TrainingConfig(activation_checkpointing=True)
    model = place(tiny.model().train(), training, CPU)
    assert all(body.is_gradient_checkpointing for body in bodies(model))
    torch.testing.assert_close(_gradients(STEPS["whole"], model, _batch()), plain)
    parts = _gradients(STEPS["parts"], model, _batch())
    torch.testing.assert_close(parts, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_layers_compute_the_same() -> None:
    plain = _gradients(STEPS["whole"], tiny.model().train(), _batch())
    model = place(tiny.model().train(), TrainingConfig(compile=True), CPU)
    found = _gradients(STEPS["whole"], model, _batch())
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)

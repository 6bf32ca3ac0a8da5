"""The generator in a joint step: what it changes, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from karma_ray.data.batch import Batch
from karma_ray.model.config import GeneratorConfig
from karma_ray.model.karma import KarmaModel
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.step import JointStep
from tests import generating, tiny

ALONE = {"generation": 0.0, "reconstruction": 0.0}


def _batch() -> Batch:
    return tiny.batch(tiny.shop())


def _gradients(model: KarmaModel, batch: Batch, **objective: Any) -> dict[str, torch.Tensor]:
    JointStep(ObjectiveConfig(**objective))(model, batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_add_is_the_sum_and_replace_the_generator_alone() -> None:
    logs = {}
    for mode in ("add", "replace"):
        objective = ObjectiveConfig(gen_mode=mode, gen_weight=0.5, **ALONE)  # type: ignore[arg-type]
        logs[mode] = JointStep(objective)(generating.model(), _batch()).logs
    assert logs["add"]["loss/generator"] == logs["replace"]["loss/generator"]
    half = 0.5 * float(logs["add"]["loss/generator"])
    assert float(logs["replace"]["loss/total"]) == pytest.approx(half)
    whole = float(logs["add"]["loss/action"]) + half
    assert float(logs["add"]["loss/total"]) == pytest.approx(whole, rel=1e-5)


def test_in_place_of_l_act_the_encoder_learns_from_histories_alone() -> None:
    first_steps = tiny.batch(tiny.sequences(tiny.window(["i1"]), tiny.window(["i2"])))
    found = _gradients(generating.model(), first_steps, gen_mode="replace", **ALONE)
    encoder = [g for name, g in found.items() if "item_encoder" in name]
    assert all(not g.abs().any() for g in encoder)  # a first step has no history
    found = _gradients(generating.model(), _batch(), gen_mode="replace", **ALONE)
    assert any(g.abs().any() for name, g in found.items() if "item_encoder" in name)
    assert any(g.abs().any() for name, g in found.items() if "user_decoder.readout" in name)
    assert not any("score" in name for name in found)


def test_weight_nought_leaves_every_other_gradient_as_it_was() -> None:
    without = _gradients(tiny.model(), _batch())
    beside = _gradients(generating.model(), _batch(), gen_weight=0.0)
    for name, gradient in without.items():
        torch.testing.assert_close(beside[name], gradient, msg=name)


@pytest.mark.parametrize("source", ["condition", "x0"])
def test_task_2_reaches_the_head_only_through_its_estimate(source: str) -> None:
    model = generating.model(recon_src=source)
    found = _gradients(model, _batch(), gen_weight=0.0, generation=0.0)
    reached = any(g.abs().any() for name, g in found.items() if "generator.head" in name)
    assert reached == (source == "x0")


def test_the_statistics_follow_training_and_not_probes() -> None:
    model = generating.model()
    step = JointStep(ObjectiveConfig(**ALONE))
    step.probe(model, _batch())
    generator = model.interest.generator
    assert generator is not None and generator.seen == 0
    step(model, _batch())
    assert generator.seen == 1 and generator.mean.abs().sum() > 0


@pytest.mark.parametrize("kind", ["mse", "fm", "edm", "ddpm_eps", "ddpm_v", "ddpm_x0"])
def test_training_lowers_the_loss(kind: str) -> None:
    model, batch = generating.model(kind=kind), _batch()
    model.interest.requires_grad_(False)
    assert model.interest.generator is not None
    model.interest.generator.requires_grad_()
    step = JointStep(ObjectiveConfig(gen_mode="replace", **ALONE), encoder_grad="frozen")
    losses = tiny.train(model, lambda: step(model, batch).loss, 40, 1e-2)
    assert losses[-1] < 0.8 * losses[0]


def test_none_is_the_default_and_builds_nothing() -> None:
    assert GeneratorConfig().kind == "none"
    logs = JointStep(ObjectiveConfig())(tiny.model(), _batch()).logs
    assert "loss/generator" not in logs and tiny.model().interest.generator is None

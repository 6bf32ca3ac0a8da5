"""How fast each weight learns, from its name, and what a step is told of the clicks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from karma_ray import recipes
from karma_ray.baselines.popularity import click_shares
from karma_ray.config import override
from karma_ray.data.config import PrepareConfig
from karma_ray.errors import InputError
from karma_ray.runs.joint import joint_job
from karma_ray.runs.pipeline import train_run
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.runs.stages import Stage
from karma_ray.runs.warm_up import warmup_key
from karma_ray.training.optim import RateMultiplier, RateMultipliers
from karma_ray.training.step_state import StepState
from tests import tiny

LAYER = "interest.{}.body.layers.0.mlp.up_proj."


@pytest.mark.parametrize(
    ("name", "multiplier"),
    [
        (LAYER.format("user_decoder") + "weight", RateMultiplier(1.0)),
        (LAYER.format("user_decoder") + "base_layer.weight", RateMultiplier(1.0)),
        (LAYER.format("user_decoder") + "lora_B.default.weight", RateMultiplier(4.0)),
        (LAYER.format("item_encoder") + "weight", RateMultiplier(0.5, start=10)),
        (LAYER.format("item_encoder") + "lora_A.default.weight", RateMultiplier(2.0, start=10)),
        ("interest.user_decoder.projector.inner.weight", RateMultiplier(4.0)),
        ("interest.item_encoder.output.weight", RateMultiplier(2.0, start=10)),
        ("decodability.body.layers.0.mlp.up_proj.weight", RateMultiplier(1.0)),
        ("lm_head", RateMultiplier(1.0)),
    ],
)
def test_new_modules_and_low_rank_adapters_learn_faster_than_a_backbone(
    name: str, multiplier: RateMultiplier
) -> None:
    assert RateMultipliers(4.0, RateMultiplier(0.5, start=10))(name) == multiplier


def test_a_warm_up_with_adapters_is_another_than_one_without() -> None:
    config = recipes.build("toy")
    assert warmup_key(override(config, ["model.peft=lora:2"]), "h") != warmup_key(config, "h")


@pytest.mark.parametrize("recipe", ["hllm", "sasrec"])
def test_a_step_is_told_how_popular_items_are_where_the_objective_asks(
    shop: str, recipe: str
) -> None:
    source = ensure_prepared(shop, PrepareConfig())
    plain = override(recipes.build(recipe), ["objective.action_loss=infonce"])
    for config in (plain, override(plain, ["objective.logq=true"])):
        stage = Stage(config, source.items_uri)
        job, model = joint_job(stage, source, shop), tiny.model()
        first = job.before_step(model, 0, StepState())
        if config is plain:
            assert first.shares is None
            continue
        assert first.shares is not None
        wanted = click_shares(source.sequences(), stage.catalog())
        assert np.array_equal(first.shares.numpy(), wanted) and len(set(wanted.tolist())) > 2
        assert first.shares.device == next(model.parameters()).device
        later = job.before_step(model, 1, StepState(0.5, shares=first.shares))
        assert later.shares is first.shares  # moved once


def test_a_correction_without_a_softmax_is_refused_before_anything_is_trained(
    shop: str, tmp_path: Path
) -> None:
    wrong = override(
        recipes.build("toy"), ["objective.logq=true", "objective.action_loss=pairwise"]
    )
    with pytest.raises(InputError, match=r"objective\.logq: True .*action_loss=pairwise"):
        train_run(wrong, shop, str(tmp_path / "run"), cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()

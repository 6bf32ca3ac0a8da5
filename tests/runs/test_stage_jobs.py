"""How fast each weight learns, from its name."""

from __future__ import annotations

import pytest

from karma_ray import recipes
from karma_ray.config import override
from karma_ray.runs.first_stages import warmup_key
from karma_ray.runs.stage_jobs import Paces
from karma_ray.training.optim import Pace

LAYER = "interest.{}.body.layers.0.mlp.up_proj."


@pytest.mark.parametrize(
    ("name", "pace"),
    [
        (LAYER.format("user_decoder") + "weight", Pace(1.0)),
        (LAYER.format("user_decoder") + "base_layer.weight", Pace(1.0)),
        (LAYER.format("user_decoder") + "lora_B.default.weight", Pace(4.0)),
        (LAYER.format("item_encoder") + "weight", Pace(0.5, start=10)),
        (LAYER.format("item_encoder") + "lora_A.default.weight", Pace(2.0, start=10)),
        ("interest.user_decoder.projector.inner.weight", Pace(4.0)),
        ("interest.item_encoder.output.weight", Pace(2.0, start=10)),
        ("decodability.body.layers.0.mlp.up_proj.weight", Pace(1.0)),
        ("lm_head", Pace(1.0)),
    ],
)
def test_new_modules_and_low_rank_adapters_learn_faster_than_a_backbone(
    name: str, pace: Pace
) -> None:
    assert Paces(4.0, Pace(0.5, start=10))(name) == pace


def test_a_warm_up_with_adapters_is_another_than_one_without() -> None:
    config = recipes.build("toy")
    assert warmup_key(override(config, ["model.peft=lora:2"]), "h") != warmup_key(config, "h")

from __future__ import annotations

import dataclasses
import json
from typing import Any, get_type_hints

import pytest

from karma_ray import pretrained, recipes
from karma_ray.config import Config, assigned, describe_fields, from_dict, override, to_dict
from karma_ray.errors import InputError


def leaves(kind: type, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[item.name]):
            found |= leaves(hints[item.name], f"{prefix}{item.name}.")  # type: ignore[arg-type]
        else:
            found[prefix + item.name] = item.default
    return found


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_survives_json(name: str) -> None:
    config = recipes.build(name)
    assert config.recipe == name
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("path", [path for path in leaves(Config) if path != "recipe"])
def test_every_default_can_be_written_on_the_command_line(path: str) -> None:
    assert override(Config(), [f"{path}={leaves(Config)[path]}"]) == Config()


@pytest.mark.parametrize("path", leaves(Config))
def test_every_field_is_explained(path: str) -> None:
    lines = describe_fields().splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith(f"  {path} = "))
    assert lines[place + 1].startswith("      ") and len(lines[place + 1].strip()) > 5


def test_an_override_changes_one_field_and_nothing_else() -> None:
    changed = override(Config(), ["training.steps=7"])
    assert changed.training.steps == 7
    assert override(changed, [f"training.steps={Config().training.steps}"]) == Config()


def test_the_last_of_two_assignments_wins() -> None:
    assert override(Config(), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("training.step=7", r"'step' is not a known field; choices: steps, batch_size"),
        ("trainin.steps=7", r"'trainin' is not a known field; choices: recipe, seed"),
        ("training.steps.more=7", r"'more' is not a known field"),
        ("training.steps", r"'training.steps' is not of the form dotted.path=value"),
        ("training=7", r"'training' is a group of fields; choices: steps"),
        ("training.steps=many", r"training.steps: 'many' should be a valid integer"),
        ("training.steps=1.5", r"training.steps: 1.5 should be a valid integer"),
        ("objective.action_loss=hinge", r"objective.action_loss: 'hinge' should be 'pairwise'"),
        ("collate.drop_query=often", r"collate.drop_query: 'often' should be a valid number"),
    ],
)
def test_a_wrong_override_names_field_value_and_choices(assignment: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        override(Config(), [assignment])


NUMBERS = {path: value for path, value in leaves(Config).items() if type(value) in (int, float)}


@pytest.mark.parametrize("path", NUMBERS)
def test_every_number_has_a_range(path: str) -> None:
    """No field is both signed and a number: below 0 there are only typing errors."""
    wrong = ["-1"] if isinstance(NUMBERS[path], int) else ["-1", "nan", "inf", "-inf"]
    for value in wrong:
        with pytest.raises(InputError, match=rf"^{path}: {value}(\.0)? should be "):
            override(Config(), [f"{path}={value}"])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("training.batch_size=0", "training.batch_size: 0 should be greater than or equal to 1"),
        ("training.encoder_delay=1", r"training.encoder_delay: 1 should be less than 1"),
        ("training.encoder_delay=40", r"training.encoder_delay: 40 should be less than 1"),
        ("training.keep_checkpoints=0", "keep_checkpoints: 0 should be greater than or equal to 1"),
        ("model.imagery.img_draws=0", "img_draws: 0 should be greater than or equal to 1"),
        ("training.grad_clip=0", "training.grad_clip: 0 should be greater than 0"),
        ("collate.drop_query=1.5", "collate.drop_query: 1.5 should be less than or equal to 1"),
    ],
)
def test_a_number_out_of_range_names_its_bound(assignment: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        override(Config(), [assignment])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"sead": 1}, "config sead: 1 is not a known field; choices: recipe, seed"),
        ({"training": {"steppes": 1}}, "config training.steppes: 1 is not a known field"),
        ({"seed": "x"}, "seed: 'x' should be a valid integer"),
    ],
)
def test_a_saved_configuration_with_unknown_or_wrong_fields_is_refused(
    value: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        from_dict(value)


def test_an_unknown_recipe_names_the_choices() -> None:
    with pytest.raises(
        InputError, match="--recipe: 'karma_txt' is not valid; choices: action_only"
    ):
        recipes.build("karma_txt")


def test_the_recipes_differ_by_their_text_terms_only() -> None:
    weights = {
        name: (config.objective.generation, config.objective.reconstruction)
        for name in ("action_only", "history_to_text", "embedding_to_text", "karma_text")
        if (config := recipes.build(name))
    }
    assert weights == {
        "action_only": (0.0, 0.0),
        "history_to_text": (1.0, 0.0),
        "embedding_to_text": (0.0, 1.0),
        "karma_text": (1.0, 1.0),
    }
    base = recipes.karma_text()
    for name in weights:
        config = recipes.build(name)
        same = dataclasses.replace(config, recipe=base.recipe, objective=base.objective)
        assert same == base


def test_the_multimodal_recipe_is_the_text_recipe_with_a_visual_term() -> None:
    config, base = recipes.build("karma_multimodal"), recipes.karma_text()
    objective = dataclasses.replace(config.objective, lambda_img=0.0)
    assert config.objective.lambda_img == 0.3
    assert dataclasses.replace(config, recipe=base.recipe, objective=objective) == base


def test_a_word_stays_a_word() -> None:
    changed = override(
        Config(), ["model.user_decoder.query_mode=none", "model.item_encoder.instruction=1"]
    )
    assert changed.model.user_decoder.query_mode == "none"
    assert changed.model.item_encoder.instruction == "1"


def test_a_recipe_made_for_an_llm_keeps_its_rate_and_asks_for_one() -> None:
    typed = ["model.checkpoint=SomeLLM/1B"]
    config = override(recipes.build("karma_llm"), typed)
    suited = pretrained.suited_to_weights(config, assigned(typed))
    assert suited.training.learning_rate == config.training.learning_rate == 2e-4
    assert suited.model.item_encoder.pool == "mean" and suited.pretrain.steps == 0
    with pytest.raises(InputError, match=r"model\.checkpoint.*name a pretrained LLM"):
        pretrained.suited_to_weights(recipes.build("karma_llm"), ())

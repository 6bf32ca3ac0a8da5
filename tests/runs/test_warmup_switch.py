"""Stage 1 trains what `warmup.train` names and nothing else."""

from __future__ import annotations

import pytest

from karma_ray import recipes
from karma_ray.config import override
from karma_ray.model.backbone import build_tiny, save_body
from karma_ray.model.backbones.tokenizer import save_tokenizer
from karma_ray.model.karma import KarmaModel
from karma_ray.runs.stages import Stage, with_checkpoints
from karma_ray.runs.warm_up import build, warmup_config, warmup_key
from tests import tiny_run


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Data, an item encoder and a user decoder: Hugging Face folders."""
    root = tmp_path_factory.mktemp("warm")
    words = tiny_run.tokenizer()
    folders = [str(root / name) for name in ("item", "user")]
    for seed, folder in enumerate(folders):
        save_body(build_tiny(tiny_run.TINY, words.backend_tokenizer.get_vocab_size(), seed), folder)
        save_tokenizer(words, folder)
    item, user = folders
    return tiny_run.write_data(root), item, user


def trained_parts(checkpoints: tuple[str, str, str], train: str) -> dict[str, bool]:
    """Part -> whether it has a gradient in stage 1."""
    items, item, user = checkpoints
    config = override(recipes.karma_text(), [f"warmup.train={train}"])
    model = build(Stage(with_checkpoints(config, item, user), items))
    assert isinstance(model, KarmaModel)
    encoder, decoder = model.interest.item_encoder, model.interest.user_decoder
    parts = {
        "item LLM": encoder.body.parameters(),
        "user LLM": decoder.body.parameters(),
        "projector": decoder.projector.parameters(),
        "W_e": encoder.output.parameters(),
    }
    found = {}
    for name, parameters in parts.items():
        learns = {parameter.requires_grad for parameter in parameters}
        assert len(learns) == 1, name
        found[name] = learns.pop()
    return found


@pytest.mark.parametrize(
    ("train", "item", "user"),
    [("decoder", False, True), ("adapters_only", False, False), ("all", True, True)],
)
def test_the_warm_up_trains_what_the_switch_names(
    checkpoints: tuple[str, str, str], train: str, item: bool, user: bool
) -> None:
    expected = {"item LLM": item, "user LLM": user, "projector": True, "W_e": True}
    assert trained_parts(checkpoints, train) == expected


def test_each_choice_is_a_warm_up_of_its_own() -> None:
    changes = ([], ["warmup.train=adapters_only"], ["warmup.train=all"])
    keys = [warmup_key(override(recipes.karma_text(), change), "h") for change in changes]
    assert all(one != other for n, one in enumerate(keys) for other in keys[:n])


def test_a_warm_up_is_told_all_that_it_is_cached_under_and_no_more() -> None:
    config = override(recipes.build("toy"), ["training.weight_decay=0.2", "seed=4"])
    told = warmup_config(config)
    assert warmup_config(told) == told
    assert warmup_key(told, "h") == warmup_key(config, "h")
    assert told.training.weight_decay == 0.2 and told.objective.lambda_dec == 1.0

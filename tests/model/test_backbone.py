"""Backbones of a known family load, anything else is named and refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from karma_ray.data.prompts import SpecialIds, encode_texts
from karma_ray.errors import InputError
from karma_ray.model.backbone import (
    build_tiny,
    keep_layers,
    load_body,
    run_body,
    save_body,
    token_embeddings,
    truncated,
)
from karma_ray.model.backbones.checkpoints import load_lm_head
from karma_ray.model.backbones.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from karma_ray.model.config import TinyBackboneConfig
from tests import tiny


def _body(seed: int = 0) -> torch.nn.Module:
    return build_tiny(tiny.BODY, 320, seed)


def _causal_lm(folder: Path, *, tied: bool) -> Qwen3ForCausalLM:
    """A whole language-model checkpoint, as a hub would hold it."""
    config = _body().config
    config.tie_word_embeddings = tied
    torch.manual_seed(3)
    whole = Qwen3ForCausalLM(config)
    whole.save_pretrained(folder)
    return whole


# --- checkpoints -----------------------------------------------------------------------------


def test_a_saved_body_loads_bitwise(tmp_path: Path) -> None:
    body = _body()
    save_body(body, str(tmp_path))
    loaded = load_body(str(tmp_path))
    assert loaded.state_dict().keys() == body.state_dict().keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, body.state_dict()[name]), name
    soft = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run_body(loaded, soft), run_body(body, soft))


def test_a_saved_body_holds_no_head(tmp_path: Path) -> None:
    save_body(_body(), str(tmp_path))
    names = load_file(tmp_path / "model.safetensors")
    assert names and not [name for name in names if "lm_head" in name]
    assert load_lm_head(str(tmp_path)) is None


@pytest.mark.parametrize("tied", [True, False])
def test_the_body_of_a_whole_language_model_loads(tmp_path: Path, tied: bool) -> None:
    whole = _causal_lm(tmp_path, tied=tied)
    loaded = load_body(str(tmp_path))
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_an_untied_checkpoint_brings_its_own_head(tmp_path: Path) -> None:
    whole = _causal_lm(tmp_path, tied=False)
    head = load_lm_head(str(tmp_path))
    assert head is not None
    assert torch.equal(head, whole.lm_head.weight)
    assert not torch.equal(head, whole.model.embed_tokens.weight)


def test_a_tied_checkpoint_has_no_head_of_its_own(tmp_path: Path) -> None:
    _causal_lm(tmp_path, tied=True)
    assert load_lm_head(str(tmp_path)) is None


def test_an_untied_checkpoint_that_lacks_its_head_is_refused(tmp_path: Path) -> None:
    """transformers would fill the missing head with random numbers."""
    body = _body()
    body.config.tie_word_embeddings = False
    save_body(body, str(tmp_path))
    with pytest.raises(InputError, match="no language-model head"):
        load_lm_head(str(tmp_path))


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    save_body(_body(), str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    gone = weights.pop("layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert gone.numel()
    with pytest.raises(InputError, match=r"lacks weights .* layers\.1\.mlp\.up_proj"):
        load_body(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_body(str(tmp_path))


@pytest.mark.parametrize("other", ["mistral", "gemma2", "bert"])
def test_another_architecture_is_named_with_the_choice(tmp_path: Path, other: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": other}))
    with pytest.raises(InputError) as caught:
        load_body(str(tmp_path), "model.user_decoder.checkpoint")
    message = str(caught.value)
    assert caught.value.field == "model.user_decoder.checkpoint"
    assert other in message and str(tmp_path) in message and "choices: qwen3" in message


def test_a_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"no config\.json"):
            load_body(str(folder))


def test_a_broken_config_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_body(str(tmp_path))


def test_tiny_is_no_folder_to_load() -> None:
    with pytest.raises(InputError, match="pretrained folder first"):
        load_body("tiny")


# --- tiny bodies -----------------------------------------------------------------------------


def test_a_seed_builds_its_body_again_and_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second, other = _body(0), _body(0), _body(1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(token_embeddings(first), token_embeddings(second))
    assert not torch.equal(token_embeddings(first), token_embeddings(other))


@pytest.mark.parametrize(
    ("shape", "field"),
    [
        ({"hidden_size": 0}, "model.tiny.hidden_size"),
        ({"num_layers": 0}, "model.tiny.num_layers"),
        ({"num_heads": 3}, "model.tiny.num_heads"),
        ({"num_heads": 4, "num_key_value_heads": 3}, "model.tiny.num_heads"),
    ],
)
def test_an_impossible_shape_is_an_input_error(shape: dict[str, int], field: str) -> None:
    with pytest.raises(InputError) as caught:
        build_tiny(TinyBackboneConfig(**shape), 300, 0)
    assert caught.value.field == field


def test_a_truncated_body_is_the_first_layers() -> None:
    body = _body()
    light = truncated(body, 1)
    assert len(light.layers) == 1 and len(body.layers) == 2
    assert torch.equal(token_embeddings(light), token_embeddings(body))
    soft = torch.randn(1, 4, 32)
    body.layers = body.layers[:1]
    body.config.num_hidden_layers = 1
    assert torch.equal(run_body(light, soft), run_body(body, soft))


@pytest.mark.parametrize("count", [0, 3])
def test_a_body_cannot_be_cut_to_more_layers_than_it_has(count: int) -> None:
    with pytest.raises(InputError, match="choices: 1, 2"):
        truncated(_body(), count)


def test_the_first_layers_of_a_checkpoint_are_saved_and_loaded_as_a_plain_folder(
    tmp_path: Path,
) -> None:
    body, soft = _body(), torch.randn(1, 4, 32)
    light = truncated(body, 1)
    keep_layers(body, 1)
    assert torch.equal(run_body(light, soft), run_body(body, soft))
    save_body(body, str(tmp_path))
    loaded = load_body(str(tmp_path))
    assert len(loaded.layers) == loaded.config.num_hidden_layers == 1
    assert torch.equal(run_body(loaded, soft), run_body(body, soft))
    with pytest.raises(InputError, match=r"model\.user_decoder\.layers.*more than the 1 layers"):
        keep_layers(body, 2, "model.user_decoder.layers")


# --- the mask --------------------------------------------------------------------------------


def test_without_a_mask_a_body_is_causal() -> None:
    body = _body()
    soft = torch.randn(2, 6, 32)
    triangle = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 6, 6)
    torch.testing.assert_close(run_body(body, soft), run_body(body, soft, triangle))


def test_a_hidden_position_is_exactly_unseen() -> None:
    """The additive mask hides: eager attention would *add* a boolean one."""
    body = _body()
    soft = torch.randn(1, 4, 32)
    visible = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    visible[:, 2:, 1] = False
    other = soft.clone()
    other[:, 1] += 5
    before, after = run_body(body, soft, visible), run_body(body, other, visible)
    assert torch.equal(before[:, [0, 2, 3]], after[:, [0, 2, 3]])
    assert not torch.equal(before[:, 1], after[:, 1])


# --- tokenizers ------------------------------------------------------------------------------


def test_a_saved_tokenizer_loads_and_encodes_alike(tmp_path: Path) -> None:
    save_tokenizer(tiny.tokenizer(), str(tmp_path))
    loaded = load_tokenizer(str(tmp_path))
    texts = [*tiny.catalog().texts(), "unseen words & signs: 红色毛衣"]
    for first, second in zip(
        encode_texts(loaded, texts, 30), encode_texts(tiny.tokenizer(), texts, 30), strict=True
    ):
        np.testing.assert_array_equal(first, second)
    assert SpecialIds.of(loaded) == SpecialIds.of(tiny.tokenizer())


def test_a_trained_tokenizer_spells_any_text() -> None:
    tokenizer = train_tokenizer(iter(["red shirt"]), 300)
    text = "naïve 红色 \u2192 mug"
    assert tokenizer.decode(tokenizer([text])["input_ids"][0]).strip() == text


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(InputError, match="at least 300"):
        train_tokenizer(iter(["red"]), 299)


def test_a_tokenizer_without_the_special_tokens_is_refused(tmp_path: Path) -> None:
    plain = Tokenizer(models.WordLevel({"red": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no tokens for the roles"):
        load_tokenizer(str(tmp_path))


def test_special_tokens_survive_a_process_border(tmp_path: Path) -> None:
    save_tokenizer(tiny.tokenizer(), str(tmp_path))
    own = load_tokenizer(str(tmp_path))
    assert own.text_marks == pickle.loads(pickle.dumps(own)).text_marks


def test_the_real_qwen_tokenizer_encodes_items(shared_data: Path) -> None:
    folder = shared_data / "qwen_tokenizer"
    if not folder.is_dir():
        pytest.skip("no qwen_tokenizer among the datasets")
    tokenizer = load_tokenizer(str(folder))
    special = SpecialIds.of(tokenizer)
    assert (special.end_of_text, special.text_start, special.text_end) == (151643, 151644, 151645)
    tokens, lengths = encode_texts(tokenizer, tiny.catalog().texts(), 24)
    assert (tokens[np.arange(len(lengths)), lengths - 1] == special.end_of_text).all()
    first = tokenizer.decode(tokens[0, : lengths[0] - 1].tolist())
    assert first == tiny.catalog().texts()[0]

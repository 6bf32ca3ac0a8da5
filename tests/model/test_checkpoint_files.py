"""A damaged checkpoint is refused in a sentence that names folder, file and reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, ViTConfig, ViTModel

from karma_ray.errors import InputError
from karma_ray.model.backbone import build_tiny, load_body, save_body
from karma_ray.model.backbones.checkpoints import load_lm_head
from karma_ray.model.backbones.tokenizer import load_tokenizer, save_tokenizer
from karma_ray.model.backbones.vision_encoder import load_vision_encoder
from tests import tiny

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_body(build_tiny(tiny.BODY, 320, 0), str(tmp_path))
    save_tokenizer(tiny.tokenizer(), str(tmp_path))
    return tmp_path


def _refusal(load: Callable[[str], object], folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(str(folder))
    assert caught.value.value == str(folder)
    return str(caught.value)


def test_a_git_lfs_pointer_in_place_of_the_weights_is_named(folder: Path) -> None:
    (folder / WEIGHTS).write_text(POINTER)
    assert f"has a Git LFS pointer in place of {WEIGHTS}" in _refusal(load_body, folder)
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    assert "in place of pytorch_model.bin" in _refusal(load_body, folder)


@pytest.mark.parametrize("kept", [0, 100, 0.5, -1])
def test_cut_weights_are_named(folder: Path, kept: float) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: int(kept * len(whole)) if kept == 0.5 else int(kept)])
    assert f"has a damaged or incomplete {WEIGHTS}" in _refusal(load_body, folder)


def test_weights_of_another_width_than_the_config_says_are_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    message = _refusal(load_body, folder)
    assert f"weight layers.0.mlp.down_proj.weight has shape [32, 64] in {WEIGHTS}" in message
    assert "config.json gives it [32, 48]" in message


def test_a_head_and_a_vision_encoder_are_checked_alike(folder: Path) -> None:
    (folder / WEIGHTS).write_text(POINTER)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    config.save_pretrained(folder)
    assert "Git LFS pointer" in _refusal(load_lm_head, folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, intermediate_size=16, image_size=32)).save_pretrained(folder / "v")
    weights = folder / "v" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "incomplete" in _refusal(
        lambda checkpoint: load_vision_encoder(checkpoint, 2), folder / "v"
    )


def test_a_folder_without_a_tokenizer_says_so(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    message = _refusal(load_tokenizer, folder)
    assert message.startswith("tokenizer:") and "holds no tokenizer" in message


def test_a_damaged_tokenizer_is_named(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text()[:-20])
    assert "has a damaged or incomplete tokenizer.json" in _refusal(load_tokenizer, folder)
    file.write_text(POINTER)
    assert "Git LFS pointer in place of tokenizer.json" in _refusal(load_tokenizer, folder)


def test_whole_files_pass(folder: Path) -> None:
    expected = build_tiny(tiny.BODY, 320, 0).state_dict()
    found = load_body(str(folder)).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert load_tokenizer(str(folder)).get_vocab() == tiny.tokenizer().get_vocab()

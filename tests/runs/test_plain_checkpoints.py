"""GGUF checkpoints are converted once per content, in the cache, and named wherever a run is."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from karma_ray.artifacts import RunFolder, read_manifest, write_json
from karma_ray.config import Config, describe_fields, override
from karma_ray.data.collate import CollateConfig
from karma_ray.errors import InputError
from karma_ray.model.backbone import load_body
from karma_ray.model.backbones.tokenizer import load_tokenizer
from karma_ray.model.config import ModelConfig
from karma_ray.model.interest import InterestModel
from karma_ray.report.record import read_run
from karma_ray.retrieval.export import load_bundle, save_bundle
from karma_ray.runs.plain_checkpoints import with_plain_checkpoints
from karma_ray.runs.stages import is_tiny

pytest.importorskip("gguf", reason="the optional package gguf is not installed")
from tests import gguf_files


def _config(file: Path) -> Config:
    return override(Config(), [f"model.checkpoint={file}"])


def _folders(config: Config) -> tuple[str, str]:
    return config.model.item_encoder.checkpoint, config.model.user_decoder.checkpoint


def test_a_file_is_converted_once_per_content(tmp_path: Path) -> None:
    file, cache = tmp_path / "m.gguf", str(tmp_path / "cache")
    gguf_files.write(file, gguf_files.whole("llama"))
    item, user = _folders(with_plain_checkpoints(_config(file), cache))
    assert item == user and Path(item).parent == tmp_path / "cache"
    manifest = read_manifest(item, "checkpoint")
    assert manifest["file"] == "m.gguf" and manifest["quantisation"] == "F32"
    made = os.stat(Path(item, "model.safetensors")).st_ino
    file.rename(tmp_path / "other.gguf")
    assert _folders(with_plain_checkpoints(_config(tmp_path / "other.gguf"), cache))[0] == item
    assert os.stat(Path(item, "model.safetensors")).st_ino == made
    gguf_files.write(file, gguf_files.whole("llama", seed=1))
    changed = with_plain_checkpoints(_config(file), cache)
    assert _folders(changed)[0] != item and not is_tiny(changed)


def test_what_was_interrupted_or_refused_leaves_no_folder(tmp_path: Path) -> None:
    file, cache = tmp_path / "m.gguf", tmp_path / "cache"
    gguf_files.write(file, gguf_files.whole("llama"), without="blk.0.ffn_up.weight")
    with pytest.raises(InputError, match=r"lacks the weights model\.layers\.0"):
        with_plain_checkpoints(_config(file), str(cache))
    gguf_files.write(file, gguf_files.whole("llama"), pre="tekken")
    with pytest.raises(InputError, match="splits texts"):
        with_plain_checkpoints(_config(file), str(cache))
    assert not [path for path in cache.iterdir() if path.is_dir()]
    gguf_files.write(file, gguf_files.whole("llama"))
    item, _ = _folders(with_plain_checkpoints(_config(file), str(cache)))
    Path(item, "manifest.json").unlink()  # as if it was not finished
    Path(item, "model.safetensors").write_bytes(b"half")
    again, _ = _folders(with_plain_checkpoints(_config(file), str(cache)))
    assert again == item and Path(item, "model.safetensors").stat().st_size > 4


def test_other_checkpoints_are_left_alone_and_two_files_may_differ(tmp_path: Path) -> None:
    plain = override(Config(), ["model.checkpoint=Qwen/Qwen3-0.6B"])
    assert with_plain_checkpoints(plain, str(tmp_path)) == plain
    for name, family in (("item", "qwen2"), ("user", "llama")):
        gguf_files.write(tmp_path / f"{name}.GGUF", gguf_files.whole(family))
    mixed = override(
        _config(tmp_path / "user.GGUF"), [f"model.item_encoder.checkpoint={tmp_path}/item.GGUF"]
    )
    resolved = with_plain_checkpoints(mixed, str(tmp_path / "cache"))
    item, user = _folders(resolved)
    assert item != user and not is_tiny(resolved)


def test_bundle_and_report_name_the_quantisation(tmp_path: Path) -> None:
    file, run = tmp_path / "m.gguf", RunFolder(str(tmp_path / "run"))
    gguf_files.write(file, gguf_files.whole("llama"), quantised=True)
    config = _config(file)
    model: ModelConfig = with_plain_checkpoints(config, str(tmp_path / "cache")).model
    tokenizer = load_tokenizer(model.user_decoder.checkpoint)
    interest = InterestModel.build(replace(model, peft="lora:2"), tokenizer, 0)
    save_bundle(interest, tokenizer, CollateConfig(), run.bundle, {"recipe": "karma_text"})
    quantised = load_bundle(run.bundle).manifest["quantised"]
    assert set(quantised) == {"item_encoder", "user_decoder"}
    assert quantised["item_encoder"]["quantisation"] == "Q8_0"
    assert load_bundle(run.bundle).tokenizer.text_marks == tokenizer.text_marks
    write_json({"model": {"item_encoder": {"checkpoint": str(file)}}}, run.config)
    assert read_run(run.root).checkpoint("item_encoder") == f"{file} (Q8_0)"
    assert read_run(run.root).checkpoint("user_decoder") == "not recorded (Q8_0)"


def test_the_short_form_sets_both_and_is_explained() -> None:
    config = override(Config(), ["model.checkpoint=x", "model.item_encoder.checkpoint=y"])
    assert _folders(config) == ("y", "x")
    assert "model.checkpoint sets model.item_encoder.checkpoint and" in describe_fields()


def test_random_weights_have_the_shapes_and_the_tokenizer_and_follow_the_seed(
    tmp_path: Path,
) -> None:
    file, cache = tmp_path / "m.gguf", str(tmp_path / "cache")
    gguf_files.write(file, gguf_files.whole("llama"))
    known = load_body(_folders(with_plain_checkpoints(_config(file), cache))[0])
    config = override(_config(file), ["model.weights=random"])
    folders = [_folders(with_plain_checkpoints(replace(config, seed=n), cache)) for n in (0, 1, 0)]
    assert folders[0] == folders[2] != folders[1] and folders[0][0] == folders[0][1]
    first, second = (load_body(item) for item, _ in folders[:2])
    shapes = {name: value.shape for name, value in known.state_dict().items()}
    assert {name: value.shape for name, value in first.state_dict().items()} == shapes
    name = "layers.0.mlp.up_proj.weight"
    drawn = [body.state_dict()[name] for body in (known, first, second)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    assert drawn[1].std().item() == pytest.approx(known.config.initializer_range, rel=0.1)
    assert not is_tiny(with_plain_checkpoints(config, cache))
    with pytest.raises(InputError, match=r"pretrain\.steps=0"):
        override(Config(), ["model.weights=random"]).model.check()
    with pytest.raises(InputError, match=r"model\.weights: 'random' .*pictures; choices"):
        override(config, ["model.item_encoder.modality=multimodal"]).model.check()

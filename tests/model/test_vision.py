"""Any Hugging Face vision encoder's folder gives a grid of features; places are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from karma_ray.errors import InputError
from karma_ray.model.backbones.qwen3_vl_pictures import cut_patches
from karma_ray.model.backbones.vision_encoder import load_vision_encoder

SHAPE: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 64, "patch_size": 8,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
QWEN_TEXT = {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "rope_scaling": ROPE}
QWEN_VISION = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 16,
    "patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
NO_DINO_MLP = {name: value for name, value in SHAPE.items() if name != "intermediate_size"}

MODELS = {
    "vit": lambda: ViTModel(ViTConfig(**SHAPE)),
    "dino with registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**NO_DINO_MLP)
    ),
    "clip": lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=SHAPE)),
    "siglip, vision only": lambda: SiglipVisionModel(SiglipVisionConfig(**SHAPE)),
    "convolutional": lambda: ConvNextModel(
        ConvNextConfig(hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1])
    ),
    "qwen3-vl": lambda: Qwen3VLModel(
        Qwen3VLConfig(text_config=QWEN_TEXT, vision_config=QWEN_VISION)
    ),
}


def _folder(name: str, root: Path) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MODELS[name]().save_pretrained(str(root / "encoder"))
    return str(root / "encoder")


def _images(side: int, count: int = 3) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_folder_gives_a_grid_of_features(name: str, tmp_path: Path) -> None:
    encoder = load_vision_encoder(_folder(name, tmp_path), 4)
    images = _images(encoder.side)
    found = encoder(images)
    assert found.shape == (3, 16, 16) and found.dtype == np.float32
    np.testing.assert_allclose(encoder(images[1:2])[0], found[1], atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    pooled = load_vision_encoder(str(tmp_path / "encoder"), 1)
    if encoder.side % 32 == 0 and name != "convolutional":  # 7 x 7 states do not divide by 4
        np.testing.assert_allclose(pooled(images)[:, 0], found.mean(1), atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "dino with registers", "qwen3-vl"])
def test_features_stand_where_their_part_of_the_image_stands(name: str, tmp_path: Path) -> None:
    encoder = load_vision_encoder(_folder(name, tmp_path), 4)
    cell = encoder.side // 4
    for row, column in ((0, 0), (1, 3), (2, 1)):
        images = _images(encoder.side, 1).repeat(2, axis=0)
        images[1, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 0
        changes = np.abs(np.subtract(*encoder(images))).mean(1)
        assert changes.argmax() == 4 * row + column


def test_patches_are_those_of_qwens_own_processor() -> None:
    images = _images(64)
    own = Qwen2VLImageProcessorPil(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_resize=False
    )(list(images), return_tensors="pt")
    pixels = (torch.from_numpy(images).float() / 255 - 0.5) / 0.5
    patches, grids = cut_patches(pixels.permute(0, 3, 1, 2), 16, 2, 2)
    torch.testing.assert_close(patches, own["pixel_values"])
    assert torch.equal(grids, own["image_grid_thw"])


def test_colours_are_normalised_as_the_folder_says(tmp_path: Path) -> None:
    folder = _folder("vit", tmp_path)
    assert load_vision_encoder(folder, 4).mean.tolist() == [0.5] * 3
    Qwen2VLImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 1, 2]).save_pretrained(
        folder
    )
    encoder = load_vision_encoder(folder, 4)
    torch.testing.assert_close(encoder.mean, torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(encoder.std, torch.tensor([0.5, 1, 2]))


def test_what_is_no_vision_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--encoder.*cannot be loaded"):
        load_vision_encoder(str(tmp_path / "nowhere"), 4)
    language = Qwen3Model(Qwen3Config(**TEXT, num_key_value_heads=1, head_dim=8))
    language.save_pretrained(str(tmp_path / "language"))
    with pytest.raises(InputError, match=r"\(qwen3\) does not take images"):
        load_vision_encoder(str(tmp_path / "language"), 4)


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    folder = _folder("vit", tmp_path)
    model = ViTModel.from_pretrained(folder)
    state = {name: v for name, v in model.state_dict().items() if "layernorm_before" not in name}
    assert len(state) < len(model.state_dict())
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(InputError, match="lacks weights of its vision part"):
        load_vision_encoder(folder, 4)

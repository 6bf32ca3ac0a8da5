"""The family Qwen3-VL (2511.21631): a Qwen3 body that contains a vision tower.

An item without a picture is encoded by a plain Qwen3 body. The body also holds the vision tower
as `visual` and the whole configuration as `whole_config`, and is saved as a Qwen3-VL folder.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    Qwen3VLVisionConfig,
    Qwen3VLVisionModel,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from karma_ray.model.backbones.checkpoints import ATTENTION, colour_scale, load_weights
from karma_ray.model.backbones.family import Family, Pictures, VisionTower
from karma_ray.model.backbones.plain_text import use_fast_layers
from karma_ray.model.backbones.qwen3 import QWEN3
from karma_ray.model.backbones.qwen3_vl_pictures import (
    add_vision_tower,
    block_side,
    cut_patches,
    insert_pictures,
)

SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps",
    "max_position_embeddings", "attention_bias", "initializer_range",
)  # fmt: skip
"""Settings that the text part shares with a Qwen3 body."""
SIDE = 256
"""Side in pixels for the tower alone: 16 x 16 patches, a multiple of every target grid."""


def load(checkpoint: str, field: str) -> Qwen3Model:
    """Load a body with its vision tower, from a folder or hub name of this family."""
    config = AutoConfig.from_pretrained(checkpoint)
    whole = load_weights(Qwen3VLModel, "Qwen3-VL", checkpoint, field)
    config.image_mean, config.image_std = colour_scale(checkpoint)
    return _body_with_vision(config, whole.language_model.state_dict(keep_vars=True), whole.visual)


def build_around(text: nn.Module, start: int, end: int, seed: int) -> Qwen3Model:
    """Build a small body with a random vision tower around the weights of a text body.

    `start` and `end` are the tokens around a picture.
    """
    settings = cast(Any, text).config
    half = settings.head_dim // 2
    plane = max(1, half * 20 // 64)  # Qwen3-VL divides 64 into 24, 20 and 20
    rope = {**settings.rope_parameters, "mrope_interleaved": True,
            "mrope_section": [half - 2 * plane, plane, plane]}  # fmt: skip
    width, heads = settings.hidden_size, settings.num_attention_heads
    shared = {name: getattr(settings, name) for name in SHARED}
    config = Qwen3VLConfig(
        text_config={**shared, "rope_parameters": rope},
        vision_config={
            "depth": 2, "hidden_size": width, "num_heads": heads, "out_hidden_size": width,
            "intermediate_size": settings.intermediate_size, "patch_size": 16,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
        vision_start_token_id=start, vision_end_token_id=end, image_token_id=start,
        tie_word_embeddings=True,
    )  # fmt: skip
    config.image_mean, config.image_std = [0.5] * 3, [0.5] * 3
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        visual = Qwen3VLVisionModel(cast(Qwen3VLVisionConfig, config.vision_config))
    return _body_with_vision(config, text.state_dict(keep_vars=True), visual)


def save(body: nn.Module, folder: str) -> None:
    """Write a folder of this family: config.json and model.safetensors, without a head."""
    parts = cast(Any, body)
    with torch.device("meta"):
        whole = Qwen3VLModel(parts.whole_config)
    state = {
        name if name.startswith("visual.") else f"language_model.{name}": value
        for name, value in body.state_dict().items()
    }
    whole.load_state_dict(state, assign=True)
    whole.save_pretrained(folder, safe_serialization=True)
    ImageProcessingMixin(
        image_mean=list(parts.whole_config.image_mean), image_std=list(parts.whole_config.image_std)
    ).save_pretrained(folder)


def tower_states(tower: nn.Module, config: Any, pixels: Tensor) -> Tensor:
    """Return the tower's states before its merger, in image order, for [n, 3, S, S]."""
    merge, count = config.spatial_merge_size, len(pixels)
    patches, grids = cut_patches(pixels, config.patch_size, merge, config.temporal_patch_size)
    states = tower(patches, grid_thw=grids.to(pixels.device)).last_hidden_state
    blocks = pixels.shape[-1] // config.patch_size // merge
    placed = states.reshape(count, blocks, blocks, merge, merge, -1)
    return cast(Tensor, placed.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3))


def _body_with_vision(config: Any, text: dict[str, Tensor], visual: nn.Module) -> Qwen3Model:
    """Build a Qwen3 body from the weights of Qwen3-VL's text part, and add the vision tower."""
    settings = config.text_config
    theta = settings.rope_parameters["rope_theta"]
    with torch.device("meta"):
        body = Qwen3Model(
            Qwen3Config(
                **{name: getattr(settings, name) for name in SHARED},
                rope_parameters={"rope_type": "default", "rope_theta": theta},
                tie_word_embeddings=config.tie_word_embeddings,
                attn_implementation=ATTENTION,
                use_cache=False,
            )
        )
    body.load_state_dict(text, assign=True)
    use_fast_layers(body)
    add_vision_tower(body, visual, Qwen3VLTextRotaryEmbedding(settings), config)
    return body.train()


QWEN3_VL = Family(
    model_type="qwen3_vl",
    load=load,
    save=save,
    stock=QWEN3.stock,
    layer_shape=QWEN3.layer_shape,
    linear_layers=QWEN3.linear_layers,
    pictures=Pictures(build_around=build_around, insert=insert_pictures, block=block_side),
    vision=VisionTower(("qwen3_vl", "qwen3_vl_moe"), "visual", SIDE, tower_states),
)

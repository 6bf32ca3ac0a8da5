"""The other door to transformers, for what sees pictures: any Hugging Face folder.

* Frozen vision encoders (METHOD 1.9): models that take whole images (ViT, DINOv2, CLIP, SigLIP,
  convolutional ones), and the vision tower of Qwen3-VL.
* Item encoders that read text and picture: Qwen3-VL, loaded as a Qwen3 body with a vision tower
  inside it (model/sight.py), and saved as the Qwen3-VL folder that it is.

Legend: n images, S pixels of a side, G cells on a side of the target grid, N_v = G * G,
d_v hidden width of the encoder.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    Qwen3VLVisionConfig,
    Qwen3VLVisionModel,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding
from transformers.utils import logging as transformers_logging

from karma_ray.errors import InputError
from karma_ray.model.backbone import ATTENTION, load_body
from karma_ray.model.layers import make_lean
from karma_ray.model.sight import cut_patches, give_sight

transformers_logging.disable_progress_bar()

QWEN = ("qwen3_vl", "qwen3_vl_moe")
BATCH = 32
"""Images encoded at once."""
QWEN_SIDE = 256
"""Pixels of a side for Qwen3-VL, which takes any size: 16 x 16 patches, a multiple of each grid."""


class VisionEncoder:
    """Images [n, S, S, 3] uint8 -> hidden states averaged to a grid [n, N_v, d_v] float32."""

    def __init__(
        self, tower: nn.Module, config: Any, grid: int, mean: list[float], std: list[float]
    ) -> None:
        self.tower, self.config, self.grid = tower.eval().requires_grad_(False), config, grid
        self.is_qwen = hasattr(config, "spatial_merge_size")
        self.side = QWEN_SIDE if self.is_qwen else _image_size(config)
        self.device = next(tower.parameters()).device
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Encode a batch."""
        starts = range(0, len(images), BATCH)
        return np.concatenate([self._encode(images[at : at + BATCH]) for at in starts])

    def _encode(self, images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.array(images)).float() / 255
        pixels = ((pixels - self.mean) / self.std).permute(0, 3, 1, 2).to(self.device)
        states = self._of_patches(pixels) if self.is_qwen else self._of_images(pixels)
        pooled = nn.functional.adaptive_avg_pool2d(states.float(), self.grid)
        return pooled.flatten(2).transpose(1, 2).contiguous().cpu().numpy()

    def _of_images(self, pixels: Tensor) -> Tensor:
        """[n, 3, S, S] -> states [n, d_v, rows, columns]."""
        states = cast(Tensor, self.tower(pixel_values=pixels).last_hidden_state)
        if states.dim() == 4:  # a convolutional encoder
            return states
        size = self.config.patch_size
        rows, columns = (self.side // s for s in ((size, size) if isinstance(size, int) else size))
        # Class, register and distillation tokens stand in front of the patches.
        patches = states[:, states.shape[1] - rows * columns :]
        return patches.transpose(1, 2).reshape(len(pixels), -1, rows, columns)

    def _of_patches(self, pixels: Tensor) -> Tensor:
        """The same by Qwen3-VL's tower: states in front of its merger, put back in their places."""
        patches, grids = cut_patches(
            pixels, self.config.patch_size, self.config.spatial_merge_size,
            self.config.temporal_patch_size,
        )  # fmt: skip
        states = self.tower(patches, grid_thw=grids.to(self.device)).last_hidden_state
        merge, count = self.config.spatial_merge_size, len(pixels)
        blocks = self.side // self.config.patch_size // merge
        placed = states.reshape(count, blocks, blocks, merge, merge, -1)
        return cast(Tensor, placed.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3))


def load_vision_encoder(checkpoint: str, grid: int, device: str = "cpu") -> VisionEncoder:
    """Load the vision part of a Hugging Face folder (or hub name).

    Raises InputError when it cannot be loaded, lacks weights or takes no images.
    """
    field = "--encoder"
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        model, info = AutoModel.from_pretrained(
            checkpoint, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(field, checkpoint, f"cannot be loaded ({error})") from None
    vision = getattr(config, "vision_config", config)
    part = "visual" if config.model_type in QWEN else "vision_model"
    tower = getattr(model, part, model)
    prefix = f"{part}." if tower is not model else ""
    lost = [name for name in info["missing_keys"] if name.startswith(prefix)]
    lost = [name for name in lost if "pooler" not in name and ".head." not in name]
    if lost:  # transformers would leave random numbers there
        raise InputError(field, checkpoint, f"lacks weights of its vision part, such as {lost[0]}")
    if not hasattr(vision, "patch_size") and getattr(vision, "num_channels", 0) != 3:
        raise InputError(field, checkpoint, f"({config.model_type}) takes no images")
    mean, std = _normalisation(checkpoint)
    return VisionEncoder(tower.to(device), vision, grid, mean, std)


def _image_size(config: Any) -> int:
    size = getattr(config, "image_size", None) or 224
    return int(size if isinstance(size, int) else size[0])


def _normalisation(checkpoint: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of the colours that the encoder was trained with; .5 where unsaid."""
    try:
        facts, _ = ImageProcessingMixin.get_image_processor_dict(checkpoint)
    except OSError:
        facts = {}
    return facts.get("image_mean") or [0.5] * 3, facts.get("image_std") or [0.5] * 3


def load_seeing_body(checkpoint: str, field: str) -> Qwen3Model:
    """Load a Qwen3-VL folder or hub name as a Qwen3 body with a vision tower.

    Raises InputError when it is none, or lacks weights.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        if config.model_type != QWEN[0]:
            raise InputError(field, config.model_type, f"is the architecture of {checkpoint}",
                             choices=QWEN[:1])  # fmt: skip
        whole, info = Qwen3VLModel.from_pretrained(
            checkpoint, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise InputError(field, checkpoint, f"cannot be loaded ({error})") from None
    if info["missing_keys"]:
        example = sorted(info["missing_keys"])[0]
        raise InputError(field, checkpoint, f"lacks weights of a Qwen3-VL body, such as {example}")
    config.image_mean, config.image_std = _normalisation(checkpoint)
    return _seeing(config, whole.language_model.state_dict(keep_vars=True), whole.visual)


def build_seeing_body(text: Qwen3Model, start: int, end: int, seed: int) -> Qwen3Model:
    """A small Qwen3-VL with random eyes around the weights of a pretrained text body.

    `start` and `end` are the tokens around a picture.
    """
    settings = cast(Any, text).config
    half = settings.head_dim // 2
    plane = max(1, half * 20 // 64)  # the shares of Qwen3-VL: 24, 20, 20 of 64
    rope = {**settings.rope_parameters, "mrope_interleaved": True,
            "mrope_section": [half - 2 * plane, plane, plane]}  # fmt: skip
    width, heads = settings.hidden_size, settings.num_attention_heads
    shared = {name: getattr(settings, name) for name in _SHARED}
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
    return _seeing(config, text.state_dict(keep_vars=True), visual)


def save_seeing_body(body: Qwen3Model, folder: str) -> None:
    """Write a Qwen3-VL folder: config.json and model.safetensors, without a head."""
    parts = cast(Any, body)
    with torch.device("meta"):
        whole = Qwen3VLModel(parts.seeing)
    state = {
        name if name.startswith("visual.") else f"language_model.{name}": value
        for name, value in body.state_dict().items()
    }
    whole.load_state_dict(state, assign=True)
    whole.save_pretrained(folder, safe_serialization=True)
    ImageProcessingMixin(
        image_mean=list(parts.seeing.image_mean), image_std=list(parts.seeing.image_std)
    ).save_pretrained(folder)


def load_item_body(checkpoint: str, modality: str, field: str) -> Qwen3Model:
    """The item encoder's body, with eyes when `modality` is `multimodal`."""
    return (load_seeing_body if modality == "multimodal" else load_body)(checkpoint, field)


_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps",
    "max_position_embeddings", "attention_bias", "initializer_range",
)  # fmt: skip


def _seeing(config: Any, text: dict[str, Tensor], visual: nn.Module) -> Qwen3Model:
    """A lean Qwen3 body around the weights of a Qwen3-VL's text part, with its eyes."""
    settings = config.text_config
    theta = settings.rope_parameters["rope_theta"]
    with torch.device("meta"):
        body = Qwen3Model(
            Qwen3Config(
                **{name: getattr(settings, name) for name in _SHARED},
                rope_parameters={"rope_type": "default", "rope_theta": theta},
                tie_word_embeddings=config.tie_word_embeddings,
                attn_implementation=ATTENTION,
                use_cache=False,
            )
        )
    body.load_state_dict(text, assign=True)
    make_lean(body)
    give_sight(body, visual, Qwen3VLTextRotaryEmbedding(settings), config)
    return body.train()

"""Frozen vision encoders (method 1.9), from any Hugging Face folder with a vision part.

These are models that take whole images (ViT, DINOv2, CLIP, SigLIP, convolutional networks), and
the vision towers of the registered families, which take patches.

Legend: n images, S pixels of a side, G cells on a side of the target grid, N_v = G * G,
d_v hidden width of the encoder.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from karma_ray.errors import InputError
from karma_ray.model.backbones.checkpoint_files import loaded
from karma_ray.model.backbones.checkpoints import colour_scale
from karma_ray.model.backbones.family import VisionTower
from karma_ray.model.backbones.registry import FAMILIES

BATCH = 32
"""Images encoded at once."""


class VisionEncoder:
    """Images [n, S, S, 3] uint8 -> hidden states averaged to a grid [n, N_v, d_v] float32."""

    def __init__(
        self, tower: nn.Module, config: Any, grid: int, mean: list[float], std: list[float],
        own: VisionTower | None = None,
    ) -> None:  # fmt: skip
        self.tower, self.config, self.grid = tower.eval().requires_grad_(False), config, grid
        self.side = own.side if own else _image_size(config)
        self._own = own  # a family's tower, which does not take whole images
        self.device = next(tower.parameters()).device
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Encode images in batches."""
        starts = range(0, len(images), BATCH)
        return np.concatenate([self._encode(images[at : at + BATCH]) for at in starts])

    def _encode(self, images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.array(images)).float() / 255
        pixels = ((pixels - self.mean) / self.std).permute(0, 3, 1, 2).to(self.device)
        if self._own is not None:
            states = self._own.states(self.tower, self.config, pixels)
        else:
            states = self._of_images(pixels)
        pooled = nn.functional.adaptive_avg_pool2d(states.float(), self.grid)
        return pooled.flatten(2).transpose(1, 2).contiguous().cpu().numpy()

    def _of_images(self, pixels: Tensor) -> Tensor:
        """[n, 3, S, S] -> states [n, d_v, rows, columns]."""
        states = cast(Tensor, self.tower(pixel_values=pixels).last_hidden_state)
        if states.dim() == 4:  # a convolutional encoder
            return states
        size = self.config.patch_size
        rows, columns = (self.side // s for s in ((size, size) if isinstance(size, int) else size))
        # Class, register and distillation tokens come before the patches.
        patches = states[:, states.shape[1] - rows * columns :]
        return patches.transpose(1, 2).reshape(len(pixels), -1, rows, columns)


def load_vision_encoder(
    checkpoint: str, grid: int, device: torch.device | str = "cpu"
) -> VisionEncoder:
    """Load the vision part of a Hugging Face folder (or hub name).

    Raises InputError when it cannot be loaded, lacks weights or takes no images.
    """
    field = "--encoder"
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(field, checkpoint, f"cannot be loaded ({error})") from None
    model, info = loaded(AutoModel, checkpoint, field)
    vision = getattr(config, "vision_config", config)
    own = _family_tower(config.model_type)
    part = own.attribute if own else "vision_model"
    tower = getattr(model, part, model)
    prefix = f"{part}." if tower is not model else ""
    lost = [name for name in info["missing_keys"] if name.startswith(prefix)]
    lost = [name for name in lost if "pooler" not in name and ".head." not in name]
    if lost:  # transformers would initialise them at random
        raise InputError(field, checkpoint, f"lacks weights of its vision part, such as {lost[0]}")
    if not hasattr(vision, "patch_size") and getattr(vision, "num_channels", 0) != 3:
        raise InputError(field, checkpoint, f"({config.model_type}) does not take images")
    mean, std = colour_scale(checkpoint)
    return VisionEncoder(tower.to(device), vision, grid, mean, std, own)


def _image_size(config: Any) -> int:
    size = getattr(config, "image_size", None) or 224
    return int(size if isinstance(size, int) else size[0])


def _family_tower(model_type: str) -> VisionTower | None:
    """Return the vision tower of a registered family, or None."""
    towers = [family.vision for family in FAMILIES.values() if family.vision is not None]
    return next((tower for tower in towers if model_type in tower.model_types), None)

"""The record of a family of LLMs: everything that the rest of the package needs to know about it.

A new family is one module in this folder and one line in registry.py.

Legend: U items, n of them with a picture, S slots without it, S' with it, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from karma_ray.model.config import TinyBackboneConfig


@dataclass(frozen=True)
class LayerShape:
    """The matrix products of one transformer layer, by shape."""

    matrices: tuple[tuple[int, int], ...]  # (inputs, outputs) of each linear layer
    attention_width: int  # of the queries of all heads together


@dataclass(frozen=True)
class BodyInput:
    """Input of a body, including pictures."""

    embeddings: Tensor  # [U, S', D]
    positions: Tensor | None  # [U, S', 3] time, row, column; None: the slot numbers
    last: Tensor  # [U] slot of the end token
    deep: tuple[Tensor, ...]  # [U, S', D] each, added to the outputs of the first layers


class InsertPictures(Protocol):
    """Insert pictures [n, S, S, 3] uint8 after the first `num_prefix` slots of `pictured` [U].

    embeddings [U, S, D], last [U]. Items without a picture keep their slots and positions. The
    vision tower gets gradients only if it `learns`.
    """

    def __call__(
        self, body: nn.Module, embeddings: Tensor, last: Tensor, num_prefix: int,
        pictured: Tensor, pixels: Tensor, *, learns: bool = True,
    ) -> BodyInput: ...  # fmt: skip


@dataclass(frozen=True)
class Pictures:
    """How a family reads pictures together with text."""

    build_around: Callable[[nn.Module, int, int, int], nn.Module]
    """(text body, tokens before and after a picture, seed) -> a small body with a random tower."""
    insert: InsertPictures
    """Text embeddings and pixels -> the input of the body."""
    block: Callable[[nn.Module], int]
    """Side, in pixels, of the block that becomes one token."""


@dataclass(frozen=True)
class VisionTower:
    """A vision part that is used alone as an encoder and does not take whole images."""

    model_types: tuple[str, ...]
    """The `model_type` in config.json of the models that contain it."""
    attribute: str
    """Its attribute in these models."""
    side: int
    """Side of its input in pixels, since the tower itself accepts any size."""
    states: Callable[[nn.Module, Any, Tensor], Tensor]
    """(tower, its configuration, normalised pixels [n, 3, S, S]) -> [n, d_v, rows, columns]."""


@dataclass(frozen=True)
class Family:
    """One family of LLMs. A *body* is its embeddings and layers, without a head."""

    model_type: str
    """The `model_type` in config.json."""
    load: Callable[[str, str], nn.Module]
    """(folder or hub name, configuration field) -> a body with the layers of model/layers.py, in
    float32. Raises InputError when it cannot be loaded or lacks weights."""
    save: Callable[[nn.Module, str], None]
    """Writes config.json and model.safetensors."""
    stock: Callable[[nn.Module, str], nn.Module]
    """Returns the same parameters in transformers' own layers, with the named attention."""
    layer_shape: Callable[[Any], LayerShape]
    """Returns the layer shape of a configuration, to count operations."""
    linear_layers: tuple[str, ...]
    """Names of a layer's linear modules, which get the low-rank adapters."""
    tiny: Callable[[TinyBackboneConfig, int, int], nn.Module] | None = None
    """(shape, vocabulary size, seed) -> a small body with random weights."""
    pictures: Pictures | None = None
    """Set for a family that reads pictures."""
    vision: VisionTower | None = None
    """Set for a family whose vision tower can be used alone."""

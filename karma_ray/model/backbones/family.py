"""What the rest of the package needs of a family of LLMs: a record that its module fills.

A further family is one module of this folder and one line in registry.py.

Legend: U items, n of them with a picture, S slots without it, S' with it, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from karma_ray.data.prompts import SpecialTokens
from karma_ray.model.config import TinyBackboneConfig


@dataclass(frozen=True)
class LayerShape:
    """The matrix products of one transformer layer."""

    matrices: tuple[tuple[int, int], ...]  # (inputs, outputs) of each linear layer
    attention_width: int  # of the queries of all heads together


@dataclass(frozen=True)
class SeenRows:
    """Input of a body, pictures included."""

    embeddings: Tensor  # [U, S', D]
    positions: Tensor | None  # [U, S', 3] time, row, column; None: each slot's number
    last: Tensor  # [U] slot of the end token
    deep: tuple[Tensor, ...]  # [U, S', D] each, added behind the first layers


class InsertPictures(Protocol):
    """Put pictures [n, S, S, 3] uint8 behind the first `num_prefix` slots of `pictured` [U] items.

    embeddings [U, S, D], last [U]. Items without a picture keep their slots and positions. The
    vision tower gets a gradient where it `learns`.
    """

    def __call__(
        self, body: nn.Module, embeddings: Tensor, last: Tensor, num_prefix: int,
        pictured: Tensor, pixels: Tensor, *, learns: bool = True,
    ) -> SeenRows: ...  # fmt: skip


@dataclass(frozen=True)
class Pictures:
    """How a family reads pictures beside text."""

    build_around: Callable[[nn.Module, int, int, int], nn.Module]
    """Text body, tokens before and behind a picture, seed -> a small body with a random tower."""
    insert: InsertPictures
    """Text embeddings and pixels -> the input of the body."""
    block: Callable[[nn.Module], int]
    """Pixels of a side that become one token."""


@dataclass(frozen=True)
class VisionTower:
    """A vision part that takes something else than whole images, as an encoder of features."""

    model_types: tuple[str, ...]
    """Whole models that it is a part of, as their config.json says."""
    attribute: str
    """Its name in the whole model."""
    side: int
    """Pixels of a side that it is given, of a tower that takes any."""
    states: Callable[[nn.Module, Any, Tensor], Tensor]
    """Tower, its configuration, normalised pixels [n, 3, S, S] -> [n, d_v, rows, columns]."""


@dataclass(frozen=True)
class Family:
    """One family. A *body* is embeddings and layers, without a head."""

    model_type: str
    """As `config.json` has it."""
    load: Callable[[str, str], nn.Module]
    """Folder or hub name, field of the configuration -> a body with lean layers, in float32.
    Raises InputError when it cannot be loaded or lacks weights."""
    save: Callable[[nn.Module, str], None]
    """Write config.json and model.safetensors."""
    stock: Callable[[nn.Module, str], nn.Module]
    """The same parameters behind transformers' own layers and the attention of that name."""
    layer_shape: Callable[[Any], LayerShape]
    """Of a configuration, for counts of operations."""
    linear_layers: tuple[str, ...]
    """Names of a layer's matrices, which low-rank adapters stand beside."""
    special: SpecialTokens
    """What ends a text, and stands around a decoded one."""
    tiny: Callable[[TinyBackboneConfig, int, int], nn.Module] | None = None
    """Shape, size of the vocabulary, seed -> a small body with random weights."""
    pictures: Pictures | None = None
    """Of a family that reads pictures."""
    vision: VisionTower | None = None
    """Its vision part alone."""

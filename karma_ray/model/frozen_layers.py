"""Frozen lower layers of a body: only the layers on top are trained, and can be run alone.

The token embeddings and the lower layers of a causal body give the same states for a text
whatever is learnt above them. They can therefore be computed once and kept
(model/frozen_states.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from karma_ray.model.config import ItemEncoderConfig, check_layers


def num_frozen(config: ItemEncoderConfig, body: nn.Module) -> int:
    """Return how many lower layers of a body stay as they are; 0: all its weights are trained.

    Raises InputError when the body has fewer layers than are to be trained.
    """
    there = len(cast(Any, body).layers)
    check_layers("model.item_encoder.train_layers", config.train_layers, there)
    return there - config.train_layers if config.train_layers else 0


def freeze_lower(body: nn.Module, count: int) -> None:
    """Freeze the token embeddings and the first `count` layers; nothing if `count` is 0.

    The body remembers it, so that `lora.set_trained` leaves them frozen.
    """
    cast(Any, body).num_frozen_layers = count
    for parameter in _lower_parameters(body):
        parameter.requires_grad_(False)


def lower_parameters(module: nn.Module) -> set[int]:
    """Return the ids of the parameters that `freeze_lower` froze in the bodies of a module."""
    return {id(value) for part in module.modules() for value in _lower_parameters(part)}


@contextmanager
def only_layers(body: nn.Module, first: int, last: int | None = None) -> Iterator[None]:
    """Let a body run its layers `first` to `last` alone, without its final norm below the top."""
    part = cast(Any, body)
    layers, norm = part.layers, part.norm
    part.layers = layers[first:last]
    if last is not None and last < len(layers):
        part.norm = nn.Identity()
    try:
        yield
    finally:
        part.layers, part.norm = layers, norm


def _lower_parameters(part: nn.Module) -> Iterator[nn.Parameter]:
    count = getattr(part, "num_frozen_layers", 0)
    if count:
        body = cast(Any, part)
        yield from body.embed_tokens.parameters()
        yield from body.layers[:count].parameters()

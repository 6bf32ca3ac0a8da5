"""Backbones of any family: building, loading, saving and running them (see model/backbones/).

A backbone is a Hugging Face *body*: embeddings and layers, without a head. It is loaded from a
checkpoint folder, hub name or URI of a known family. `tiny` ones are built here and saved in the
same form, so everything after pretraining reads an ordinary Hugging Face folder.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from karma_ray.errors import InputError
from karma_ray.model import packing
from karma_ray.model.backbones.checkpoints import skeleton as skeleton
from karma_ray.model.backbones.registry import (
    FAMILIES,
    TINY,
    TINY_WITH_PICTURES,
    checkpoint_family,
    family_of,
)
from karma_ray.model.config import (
    ItemEncoderConfig,
    TinyBackboneConfig,
    UserDecoderConfig,
    check_layers,
)
from karma_ray.node_cache import local_copy


def build_tiny(config: TinyBackboneConfig, vocab_size: int, seed: int) -> nn.Module:
    """Build a small body with random weights and the vocabulary size of its tokenizer."""
    for name in ("hidden_size", "num_layers", "num_heads", "num_key_value_heads"):
        if getattr(config, name) < 1:
            raise InputError(f"model.tiny.{name}", getattr(config, name), "must be at least 1")
    if config.hidden_size % config.num_heads or config.num_heads % config.num_key_value_heads:
        raise InputError(
            "model.tiny.num_heads", config.num_heads,
            "must divide hidden_size and be a multiple of num_key_value_heads",
        )  # fmt: skip
    build = FAMILIES[TINY].tiny
    assert build is not None
    return build(config, vocab_size, seed)


def build_tiny_with_pictures(text: nn.Module, start: int, end: int, seed: int) -> nn.Module:
    """Build a small multimodal body: a random vision tower around the weights of a text body.

    `start` and `end` are the tokens around a picture.
    """
    pictures = FAMILIES[TINY_WITH_PICTURES].pictures
    assert pictures is not None
    return pictures.build_around(text, start, end, seed)


def load_body(
    checkpoint: str, field: str = "checkpoint", *, with_vision: bool = False
) -> nn.Module:
    """Load a body from a folder, hub name or URI, with a vision tower if `with_vision`.

    Raises InputError when its family is unknown or unsuitable.
    """
    checkpoint = local_copy(checkpoint)
    return checkpoint_family(checkpoint, field, with_vision=with_vision).load(checkpoint, field)


def load_item_body(config: ItemEncoderConfig) -> nn.Module:
    """Load the body of an item encoder, with as many of its layers as the encoder has."""
    body = load_body(
        config.checkpoint, "model.item_encoder.checkpoint",
        with_vision=config.modality == "multimodal",
    )  # fmt: skip
    if config.layers:
        keep_layers(body, config.layers, "model.item_encoder.layers")
    return body


def load_user_body(config: UserDecoderConfig) -> nn.Module:
    """Load the body of a user decoder, with as many of its layers as the decoder has."""
    body = load_body(config.checkpoint, "model.user_decoder.checkpoint")
    if config.layers:
        keep_layers(body, config.layers, "model.user_decoder.layers")
    return body


def save_body(body: nn.Module, folder: str) -> None:
    """Write an ordinary folder of the body's family: config.json and model.safetensors."""
    family_of(body).save(body, folder)


def stock_body(body: nn.Module, attention: str = "eager") -> nn.Module:
    """Return the same parameters in transformers' own layers, as a reference and for maps."""
    return family_of(body).stock(body, attention)


def has_vision(body: nn.Module) -> bool:
    """Whether a body has a vision tower."""
    return family_of(body).pictures is not None


def run_body(
    body: nn.Module,
    embeddings: Tensor,
    visible: Tensor | None = None,
    positions: Tensor | None = None,
    real: Tensor | None = None,
    deep: Sequence[Tensor] = (),
) -> Tensor:
    """Return the last hidden states [B, S, D] of soft tokens [B, S, D].

    `visible` [B, S, S] is the attention mask: which position (row) attends to which (column);
    without it the body is causal. `positions` [B, S] default to the slot numbers. Slots that are
    not `real` [B, S] need not be computed: no real slot may attend to them (in a causal pass they
    come last), and their states are finite but unspecified. Bodies that read pictures take
    positions [B, S, 3] and `deep`, tensors [B, S, D] that are added to the outputs of the first
    layers.
    """
    num_rows, num_slots = embeddings.shape[:2]
    if positions is None:
        positions = torch.arange(num_slots, device=embeddings.device).expand(num_rows, -1)
    if real is None or not packing.worth_packing(real):
        everything = torch.ones(num_rows, num_slots, dtype=torch.bool, device=embeddings.device)
        plan = packing.Packing(everything, visible, packed=False)
        return _states(body, embeddings, positions, plan, deep)
    plan = packing.Packing(real, visible)
    tokens, places = plan.collect(embeddings), plan.collect(positions)
    deep = [plan.collect(layer)[None] for layer in deep]
    return plan.spread(_states(body, tokens[None], places[None], plan, deep)[0])


def run_packed(body: nn.Module, tokens: Tensor, real: Tensor) -> Tensor:
    """As `run_body` in a causal pass, for the soft tokens [N, D] of the `real` slots [B, S] alone.

    The states [B, S, D] of other slots are finite but unspecified.
    """
    plan = packing.Packing(real)
    positions = torch.arange(real.shape[1], device=real.device).expand(len(real), -1)
    if not packing.worth_packing(real):
        everything = packing.Packing(torch.ones_like(real), packed=False)
        return _states(body, plan.spread(tokens), positions, everything, ())
    return plan.spread(_states(body, tokens[None], plan.collect(positions)[None], plan, ())[0])


def continue_body(
    body: nn.Module, embeddings: Tensor, positions: Tensor, past: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor]:
    """Run new soft tokens [B, N, D] behind P earlier slots of each row.

    `positions` [B, N]; `past` [L, 2, B, K, P, d] are the keys and values of the earlier slots in
    each layer, in the type that the layers compute in; `visible` [B, N, P + N]. Returns the last
    hidden states [B, N, D], float32, and the keys and values [L, 2, B, K, N, d] of the new slots.
    """
    plan = packing.Continuation(past, visible)
    states = _states(body, embeddings.to(past.dtype), positions, plan, ())
    return states.float(), torch.stack(plan.new)


def compute_in(body: nn.Module, dtype: torch.dtype) -> None:
    """Hold and compute the layers of a body in a type; its rows for tokens stay as they are."""
    parts = cast(Any, body)
    parts.layers.to(dtype)
    parts.norm.to(dtype)


def computes_in(body: nn.Module) -> torch.dtype:
    """Return the type in which the layers of a body compute."""
    return next(iter(cast(Any, body).layers.parameters())).dtype  # type: ignore[no-any-return]


def key_value_shape(body: nn.Module) -> tuple[int, int, int]:
    """Return layers L, key/value heads K and head width d of what a body stores per slot."""
    config = cast(Any, body).config
    shape = family_of(body).layer_shape(config)
    width = shape.attention_width // config.num_attention_heads
    return num_layers(body), int(config.num_key_value_heads), width


def _states(
    body: nn.Module, embeddings: Tensor, positions: Tensor, plan: Any, deep: Sequence[Tensor]
) -> Tensor:
    if positions.dim() == 3:
        positions = positions.movedim(-1, 0)  # transformers puts the three axes first
    plan.prepare()
    options = {"deep": deep} if deep else {}
    output = body(
        inputs_embeds=embeddings, position_ids=positions, use_cache=False, packing=plan, **options
    )
    return cast(Tensor, output.last_hidden_state)


def truncated(body: nn.Module, num_layers: int) -> nn.Module:
    """Return a copy with the first `num_layers` layers (a light decoder)."""
    whole = cast(Any, body).layers
    if not 1 <= num_layers <= len(whole):
        raise InputError(
            "model.decodability.recon_decoder", f"light:{num_layers}",
            "needs a number of layers", choices=range(1, len(whole) + 1),
        )  # fmt: skip
    light = copy.deepcopy(body)
    keep_layers(light, num_layers)
    return light


def keep_layers(body: nn.Module, num_layers: int, field: str = "num_layers") -> None:
    """Keep only the first `num_layers` layers of a body, in place.

    Raises InputError that names `field` when the body has fewer.
    """
    kept = cast(Any, body)
    check_layers(field, num_layers, len(kept.layers))
    kept.layers = kept.layers[:num_layers]
    kept.config.num_hidden_layers = num_layers
    if getattr(kept.config, "layer_types", None):
        kept.config.layer_types = kept.config.layer_types[:num_layers]


def add_token(body: nn.Module, row: Tensor) -> int:
    """Append a row [D] to the token embeddings of a body, in place; returns its number."""
    rows = token_embeddings(body)
    whole = cast(Any, body)
    whole.embed_tokens = nn.Embedding(len(rows) + 1, len(row))
    whole.embed_tokens.weight.data = torch.cat([rows, row[None]]).detach()
    whole.config.vocab_size = len(rows) + 1
    return len(rows)


def num_layers(body: nn.Module) -> int:
    """Return the number of layers of a body."""
    return len(cast(Any, body).layers)


def quantised_from(body: nn.Module) -> dict[str, Any] | None:
    """Return name and quantisation of the file that a body was converted from, if it was."""
    found: dict[str, Any] | None = getattr(cast(Any, body).config, "converted_from", None)
    return found


def hidden_size(body: nn.Module) -> int:
    """Return the width of a body."""
    return int(cast(Any, body).config.hidden_size)


def token_embeddings(body: nn.Module) -> Tensor:
    """Return the input-embedding rows [V, D]."""
    return cast(Tensor, cast(Any, body).embed_tokens.weight)

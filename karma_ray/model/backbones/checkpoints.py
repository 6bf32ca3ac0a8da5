"""Hugging Face checkpoints of any family: model type, weights, head and colour normalisation.

A checkpoint is a folder, a hub name, or the URI of a folder, which is fetched to this node.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging as transformers_logging

from karma_ray.data.prompts import Tokenizer
from karma_ray.errors import InputError
from karma_ray.model import packing
from karma_ray.model.backbones.checkpoint_files import loaded
from karma_ray.model.backbones.tokenizer import load_tokenizer, save_tokenizer
from karma_ray.node_cache import local_copy

transformers_logging.disable_progress_bar()

ATTENTION = "karma_ray"
AttentionInterface.register(ATTENTION, packing.attend)


def config_facts(checkpoint: str, field: str) -> dict[str, Any]:
    """Return config.json of a folder or hub name, as written.

    Raises InputError if there is none or it has no `model_type`.
    """
    if checkpoint == "tiny":
        raise InputError(field, checkpoint, "must be resolved to a pretrained folder first")
    checkpoint = local_copy(checkpoint)
    looks_local = checkpoint.startswith((".", "/", "~")) or Path(checkpoint).exists()
    if looks_local and not (Path(checkpoint) / "config.json").exists():
        raise InputError(field, checkpoint, "is not a checkpoint folder (no config.json)")
    try:
        facts: dict[str, Any] = PreTrainedConfig.get_config_dict(checkpoint)[0]
    except (OSError, ValueError) as error:
        raise InputError(field, checkpoint, f"cannot be loaded ({error})") from None
    if not facts.get("model_type"):
        raise InputError(field, checkpoint, "has no model_type in its config.json")
    return facts


def skeleton(folder: str) -> nn.Module:
    """Return a body with the shapes of a folder's, whose weights are neither read nor stored."""
    with torch.device("meta"):
        return cast(nn.Module, AutoModel.from_config(AutoConfig.from_pretrained(folder)))


def shape_facts(checkpoint: str) -> dict[str, Any]:
    """Return family, layers and width of a checkpoint's language model."""
    config = AutoConfig.from_pretrained(local_copy(checkpoint))
    text = config.get_text_config()
    return {
        "family": config.model_type,
        "layers": text.num_hidden_layers,
        "width": text.hidden_size,
    }


def num_tokens(checkpoint: str) -> int:
    """Return the number of rows of a checkpoint's token embeddings."""
    return int(AutoConfig.from_pretrained(local_copy(checkpoint)).get_text_config().vocab_size)


def load_weights(kind: Any, name: str, checkpoint: str, field: str, **options: Any) -> Any:
    """Load a transformers model of class `kind` in float32.

    Raises InputError when it cannot be loaded or lacks weights, which transformers would replace
    by random numbers. `name` is the family's name in messages.
    """
    model, info = loaded(kind, checkpoint, field, **options)
    if info["missing_keys"]:
        example = sorted(info["missing_keys"])[0]
        raise InputError(field, checkpoint, f"lacks weights of a {name} body, such as {example}")
    return model


def load_lm_head(checkpoint: str, *, empty: bool = False) -> Tensor | None:
    """Return the output embeddings [V, D], or None if the head is tied to the input embeddings.

    `empty` gives zeros of that shape, to be filled from a run's own weights, since the body in a
    bundle has no head.
    """
    config = AutoConfig.from_pretrained(checkpoint := local_copy(checkpoint))
    if config.tie_word_embeddings:
        return None
    if empty:
        return torch.zeros(config.vocab_size, config.hidden_size)
    whole, info = loaded(AutoModelForCausalLM, checkpoint, "checkpoint")
    if "lm_head.weight" in info["missing_keys"]:  # transformers would use a random one
        raise InputError("checkpoint", checkpoint, "has no language-model head, tied or its own")
    return cast(Tensor, whole.get_output_embeddings().weight.detach().clone())


def draw_weights(checkpoint: str, folder: str, field: str, seed: int) -> None:
    """Write a checkpoint of text with its shapes and tokenizer, and weights drawn by transformers.

    Raises InputError when the checkpoint cannot be loaded.
    """
    config_facts(checkpoint := local_copy(checkpoint), field)
    config = AutoConfig.from_pretrained(checkpoint)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, safe_serialization=True)
    save_tokenizer(cast(Tokenizer, load_tokenizer(checkpoint, field)), folder)


def colour_scale(checkpoint: str) -> tuple[list[float], list[float]]:
    """Return mean and deviation of the colours an encoder was trained with; 0.5 if not given."""
    try:
        facts, _ = ImageProcessingMixin.get_image_processor_dict(checkpoint)
    except OSError:
        facts = {}
    return facts.get("image_mean") or [0.5] * 3, facts.get("image_std") or [0.5] * 3

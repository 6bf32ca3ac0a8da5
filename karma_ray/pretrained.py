"""What a configuration is changed to where its weights come from a pretrained LLM."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from karma_ray.config import Config, override
from karma_ray.errors import InputError
from karma_ray.recipes import MADE_FOR_LLM

LOG = logging.getLogger(__name__)

PRETRAINED: dict[str, Any] = {
    "training.learning_rate": 5e-5,
    "training.new_module_lr": 10.0,
    "warmup.learning_rate": 5e-5,
    "pretrain.steps": 0,
    "collate.max_item_tokens": 48,
    "model.item_encoder.pool": "mean",
}
"""What a recipe is changed to where the weights come from a pretrained LLM: rates that do not
overwrite what it knows, new modules that learn ten times as fast, more of each text, and items as
the mean of their tokens' states, because an LLM's last state is about the next token."""


def names_llm(config: Config) -> bool:
    """Whether the item encoder's weights come from a pretrained LLM."""
    return config.model.item_encoder.checkpoint != "tiny"


def starts_from_llm(config: Config) -> bool:
    """Whether both parts of a KARMA model start from a pretrained LLM."""
    item, user = config.model.item_encoder, config.model.user_decoder
    return config.model.kind == "karma" and "tiny" not in (item.checkpoint, user.checkpoint)


def suited_to_weights(config: Config, typed: Collection[str]) -> Config:
    """Return the configuration with `settings_of_weights`, and log them."""
    changes = settings_of_weights(config, typed)
    if changes:
        LOG.info("pretrained weights: %s", ", ".join(changes))
    return override(config, changes)


def settings_of_weights(config: Config, typed: Collection[str]) -> list[str]:
    """Return `PRETRAINED`, except for `typed` fields, as `--set` takes it, if an LLM is named.

    Pooling, instruction and length of text are those of a folder of sentence-transformers, if the
    item encoder starts from one. Raises InputError when the encoder does not compute what it does,
    and when a recipe that is made for an LLM names none.
    """
    item, fields = config.model.item_encoder, dict(PRETRAINED)
    own = MADE_FOR_LLM.get(config.recipe, ())
    if not starts_from_llm(config):
        if own:
            message = f"is not enough for the recipe {config.recipe}: name a pretrained LLM"
            raise InputError("model.checkpoint", "tiny", f"{message} (docs/pretrained.md)")
        return []
    if item.modality != "text":  # there most states of an item are its picture's
        del fields["model.item_encoder.pool"]
    elif "://" in item.checkpoint or Path(item.checkpoint).is_dir():
        from karma_ray.model.backbones.sentence_folder import own_fields  # takes a second

        fields |= own_fields(item.checkpoint)
    return [f"{name}={value}" for name, value in fields.items() if name not in (*typed, *own)]

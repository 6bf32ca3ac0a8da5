"""The known families of LLMs, by the `model_type` in config.json."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from karma_ray.errors import InputError
from karma_ray.model.backbones.checkpoints import config_facts
from karma_ray.model.backbones.exactness import inexact, own_code
from karma_ray.model.backbones.family import Family, Pictures
from karma_ray.model.backbones.llama import LLAMA
from karma_ray.model.backbones.qwen2 import QWEN2
from karma_ray.model.backbones.qwen3 import QWEN3
from karma_ray.model.backbones.qwen3_vl import QWEN3_VL

FAMILIES = {family.model_type: family for family in (QWEN3, QWEN2, LLAMA, QWEN3_VL)}
TINY, TINY_WITH_PICTURES = QWEN3.model_type, QWEN3_VL.model_type
"""Families that are built when no checkpoint is given."""


def checkpoint_family(checkpoint: str, field: str, *, with_vision: bool = False) -> Family:
    """Return the family of a folder or hub name; with `with_vision` one that reads pictures.

    Raises InputError that names another model type and the choices, or what of the checkpoint
    would not be computed as it was trained.
    """
    facts = config_facts(checkpoint, field)
    found = facts["model_type"]
    reason = own_code(facts) if with_vision else inexact(facts)
    choices = [
        name for name, family in FAMILIES.items() if (family.pictures is not None) == with_vision
    ]
    if found not in choices:
        message = f"is the architecture of {checkpoint}" + (f", which {reason}" if reason else "")
        raise InputError(field, found, message, choices=choices)
    if reason:
        raise InputError(field, checkpoint, reason)
    return FAMILIES[found]


def family_of(body: nn.Module) -> Family:
    """Return the family of a loaded body; a multimodal body names it in `whole_config`."""
    config = getattr(body, "whole_config", None) or cast(Any, body).config
    return FAMILIES[config.model_type]


def pictures_of(body: nn.Module) -> Pictures:
    """Return how a loaded body reads pictures."""
    pictures = family_of(body).pictures
    assert pictures is not None
    return pictures

"""Low-rank adaptation of both backbones (LoRA, 2106.09685), `model.peft=lora:R`.

    y = W x + (alpha / R) B A x,  A [R, in] random, B [out, R] zero at the start, alpha = 2 R

* All linear layers of the transformer layers have adapters; with adapters on attention alone they
  learn less (LoRA Without Regret, Thinking Machines 2025).
* The backbone's own weights are frozen, including token embeddings and an untied head. New modules
  (projector, W_e, read-out, query embedding, score) are fully trained.
* The warm-up uses the same adapters, so both stages have weights of the same names.
  `warmup.train=adapters_only` means the new modules and freezes the low-rank adapters.
* Task 2's private decoders are copies with separate adapters.
* A bundle stores W + (alpha / R) B A, so serving does not know about adapters.

Gradients are switched with `set_trained`, because `requires_grad_(True)` would unfreeze the
backbone's own weights.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn

from karma_ray.errors import InputError
from karma_ray.model.backbones.registry import family_of
from karma_ray.model.frozen_layers import lower_parameters

FIELD = "model.peft"
ALPHA = 2
"""alpha / R."""


def parse_rank(peft: str) -> int | None:
    """Return R of `lora:R`, or None for `full`; raises InputError on anything else."""
    if peft == "full":
        return None
    kind, _, rank = peft.partition(":")
    if kind != "lora" or not (rank.isascii() and rank.isdigit()) or int(rank) < 1:
        raise InputError(FIELD, peft, choices=["full", "lora:R with a rank R of at least 1"])
    return int(rank)


def adapt(body: nn.Module, rank: int, seed: int, first: int = 0) -> None:
    """Insert adapters into a body, in place, and freeze its own weights; its output stays equal.

    Only the layers from number `first` on get adapters. A is drawn from `seed`; the global random
    state is preserved.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = family_of(body).linear_layers
    if first:
        lower = tuple(f"layers.{number}." for number in range(first))
        linear = tuple(
            name
            for name, _ in body.named_modules()
            if name.endswith(linear) and not name.startswith(lower)
        )
    config = LoraConfig(
        r=rank, lora_alpha=ALPHA * rank, lora_dropout=0.0, target_modules=list(linear)
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, body)


def rank_of(body: nn.Module) -> int | None:
    """Return R of an adapted body (or of a copy), or None for a plain body."""
    configs = getattr(body, "peft_config", None)
    return None if configs is None else int(configs["default"].r)


def is_low_rank(name: str) -> bool:
    """Whether a parameter of this name belongs to a low-rank adapter."""
    return ".lora_" in name


def set_trained(module: nn.Module, trained: bool) -> None:
    """Like `requires_grad_`, but weights and heads of adapted bodies in `module` stay frozen.

    So do the frozen layers of bodies of which only the top is trained.
    """
    adapted = [part for part in module.modules() if rank_of(part) is not None]
    fixed = {
        id(value)
        for body in adapted
        for name, value in body.named_parameters()
        if not is_low_rank(name)
    } | lower_parameters(module)
    for name, value in module.named_parameters():
        own = id(value) in fixed or (adapted and name.endswith("lm_head"))
        value.requires_grad_(trained and not own)


def set_encoder_trained(encoder: nn.Module, trained: bool, *, head_only: bool) -> None:
    """`set_trained` for an item encoder, of which with `head_only` nothing but W_e ever learns."""
    set_trained(encoder, trained and not head_only)
    if head_only:
        cast(Any, encoder).output.requires_grad_(trained)


def merged(body: nn.Module) -> nn.Module:
    """Return an equivalent body without adapters: a plain body itself, or a merged copy."""
    if rank_of(body) is None:
        return body
    from peft.tuners.lora import LoraLayer

    plain = copy.deepcopy(body)
    layers = [(name, part) for name, part in plain.named_modules() if isinstance(part, LoraLayer)]
    for name, part in layers:
        layer = cast(Any, part)
        layer.merge()
        plain.set_submodule(name, layer.get_base_layer())
    del cast(Any, plain).peft_config
    return plain

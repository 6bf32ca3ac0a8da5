"""AdamW groups and a learning rate that is a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from karma_ray.errors import InputError


def build_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.01,
    new_module_lr: float = 1.0,
    is_backbone: Callable[[str], bool] = lambda name: True,
) -> torch.optim.AdamW:
    """AdamW in up to four groups: decay on matrices only, another rate for new modules.

    `is_backbone` tells from a parameter's name whether it came with the Hugging Face backbone;
    all others are new modules and learn `new_module_lr` times as fast (METHOD 1.10). Frozen
    parameters are left out. Each group keeps its peak rate as `peak_lr`.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (is_backbone(name), parameter.ndim >= 2)
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise InputError("model", type(model).__name__, "has no parameter to train")
    described: list[dict[str, Any]] = []
    for (backbone, matrix), parameters in sorted(groups.items()):
        rate = learning_rate * (1.0 if backbone else new_module_lr)
        decay = weight_decay if matrix else 0.0
        described.append({"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay})
    # The fused kernel spares a small model several milliseconds of Python per step.
    return torch.optim.AdamW(described, lr=learning_rate, fused=True)


def learning_rate_factor(
    step: int, steps: int, warmup_share: float = 0.05, floor: float = 0.1
) -> float:
    """Linear warm-up to 1, then cosine to `floor`; `step` counts from 0."""
    warmup = max(1, round(warmup_share * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Give every group `factor` of its peak rate; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])

"""AdamW parameter groups, and a learning rate that is a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from karma_ray.errors import InputError
from karma_ray.model.lora import is_low_rank
from karma_ray.training.checkpoints.shards import is_sharded


@dataclass(frozen=True, order=True)
class RateMultiplier:
    """How the learning rate of a parameter differs from the common schedule."""

    factor: float = 1.0
    """Factor on the learning rate."""
    start: int = 0
    """Step before which the parameter is frozen."""
    rise: int = 0
    """Steps after `start` over which the rate rises, as Adam's first steps have full length."""


@dataclass(frozen=True)
class RateMultipliers:
    """Returns the multiplier of a parameter from its name."""

    new_module: float
    encoder: RateMultiplier

    def __call__(self, name: str) -> RateMultiplier:
        """Parameters of a Hugging Face checkpoint belong to a backbone; all others are new.

        Low-rank adapters count as new: they need several times the learning rate of the weights
        that they adapt (about ten times, LoRA Without Regret, 2025).
        """
        backbone = (".body." in name and not is_low_rank(name)) or name.endswith("lm_head")
        factor = 1.0 if backbone else self.new_module
        if ".item_encoder." not in name:
            return RateMultiplier(factor)
        return replace(self.encoder, factor=factor * self.encoder.factor)


def common_schedule(name: str) -> RateMultiplier:
    """Let every parameter follow the common schedule."""
    return RateMultiplier()


def build_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.01,
    multiplier_of: Callable[[str], RateMultiplier] = common_schedule,
) -> torch.optim.AdamW:
    """Build AdamW with weight decay on matrices only, and one group per multiplier.

    `multiplier_of` maps a parameter's name to its multiplier: new modules may learn faster than a
    pretrained backbone (method 1.10), the item encoder later and slower. Frozen parameters are
    left out. Each group stores its peak rate as `peak_lr`, and also `start` and `rise`.
    """
    groups: dict[tuple[RateMultiplier, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # The fused kernel cannot mix sharded and whole parameters.
            kind = (multiplier_of(name), parameter.ndim >= 2, is_sharded(parameter))
            groups.setdefault(kind, []).append(parameter)
    if not groups:
        raise InputError("model", type(model).__name__, "has no parameter to train")
    described: list[dict[str, Any]] = []
    for (multiplier, matrix, _), parameters in sorted(groups.items(), key=lambda item: item[0]):
        rate = learning_rate * multiplier.factor
        decay = weight_decay if matrix else 0.0
        described.append(
            {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay,
             "start": multiplier.start, "rise": multiplier.rise}
        )  # fmt: skip
    # The fused kernel saves several milliseconds of Python per step on a small model.
    return torch.optim.AdamW(described, lr=learning_rate, fused=True)


def learning_rate_factor(
    step: int, steps: int, warmup_share: float = 0.05, floor: float = 0.1
) -> float:
    """Return linear warm-up to 1, then cosine decay to `floor`; `step` counts from 0."""
    warmup = max(1, round(warmup_share * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float, step: int = 0) -> float:
    """Set every group's rate to `factor` of its peak times its multiplier; returns the largest."""
    for group in optimizer.param_groups:
        begun = step - group["start"] + 1
        risen = min(1.0, max(0.0, begun / max(1, group["rise"])))
        group["lr"] = group["peak_lr"] * factor * risen
    return max(float(group["lr"]) for group in optimizer.param_groups)

"""Counts of the work of a joint step, for its logs."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from karma_ray.data.batch import host_of
from karma_ray.model.karma import KarmaModel
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.flops import joint_flops
from karma_ray.training.imagery_term import image_flops
from karma_ray.training.item_table import SharedBatch


def work_done(
    model: KarmaModel,
    shared: SharedBatch,
    objective: ObjectiveConfig,
    encoder: Literal["full", "frozen", "bank"],
) -> dict[str, Tensor | float]:
    """Return this worker's counts, and the share of duplicate work that was avoided."""
    batch = shared.batch.on_host()
    slots = batch.item_tokens.numel() + 2 * batch.step_mask.numel()
    flops = joint_flops(
        model, batch, objective.built,
        encoder=encoder, positions=objective.act_positions, own=shared.own, pool=len(shared.pool),
    )  # fmt: skip
    return {
        "negatives/pool": float(len(shared.pool)),
        "work/duplicates_removed": 1.0 - shared.num_items / max(1, shared.num_uses),
        "work/padding_removed": 1.0 - batch.num_tokens / max(1, slots),
        "tokens": float(batch.item_lengths[host_of(shared.own)].sum() + 2 * batch.step_mask.sum()),
        "examples": float(batch.num_windows),
        "flops": flops + image_flops(model, batch),
    }

"""The action loss of a batch, and the generator's loss on the same steps (method 1.12).

This worker's anchors are scored against the positives of all workers, in bounded memory.

Legend: B windows, T steps, U items, G items of all workers, N trained steps, P pool, H hard
negatives, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from karma_ray.data.batch import Batch, host_of, upload
from karma_ray.data.draws import hashed
from karma_ray.model.interest import InterestModel
from karma_ray.model.recall import RecallModel
from karma_ray.objectives.action import ACTION_LOSSES, pair_weights
from karma_ray.objectives.losses import ObjectiveConfig, hard_weight_at
from karma_ray.objectives.negatives import (
    hard_negative_mask,
    in_batch_mask,
    inclusion_log_chance,
)
from karma_ray.training.item_table import SharedBatch
from karma_ray.training.step_state import StepState

MAX_PAIRS = 4 * 1024 * 1024
"""Scores kept in memory at once; larger batches recompute theirs in the backward pass."""


@dataclass(frozen=True)
class Pool:
    """In-batch negatives of every anchor: the positives of all workers, one per content."""

    vectors: Tensor  # e [P, D]
    content: Tensor  # [P]
    log_chance: Tensor | None = None  # [P] log probability of being in the pool, for logQ

    @classmethod
    def of(
        cls, shared: SharedBatch, items: Tensor, objective: ObjectiveConfig, state: StepState
    ) -> Pool:
        """Build the pool of a step from the embeddings [G, D] of its items."""
        batch, chosen, log_chance = shared.batch, shared.pool, None
        if objective.logq:
            assert state.shares is not None, "objective.logq needs the shares of the clicks"
            shares = state.shares[batch.item_rows[chosen]]
            log_chance = inclusion_log_chance(shares, shared.num_clicks)
        return cls(items[chosen], batch.item_content[chosen], log_chance)


@dataclass(frozen=True)
class ActionTerm:
    """Sums over this worker's trained steps, to be divided by a global count."""

    loss: Tensor  # scalar
    negatives: Tensor  # [2] surviving hard and in-batch negatives


def trained_steps(batch: Batch, positions: str) -> Tensor:
    """Return the mask [B, T] of steps in L_act: `all` trained ones, or each window's `last`."""
    trained = batch.loss_mask
    if positions == "last":
        order = torch.arange(trained.shape[1], device=trained.device)
        trained = trained & (order == (trained * order).amax(1, keepdim=True))
    return trained


def _places(batch: Batch, objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Return windows [N] and steps [N] of the steps in L_act."""
    trained = trained_steps(batch.on_host(), objective.act_positions)
    window, step = trained.nonzero(as_tuple=True)
    return upload(window, batch.loss_mask.device), upload(step, batch.loss_mask.device)


def action_term(
    model: RecallModel,
    batch: Batch,
    interest: Tensor,
    items: Tensor,
    pool: Pool,
    objective: ObjectiveConfig,
    progress: float = 1.0,
) -> ActionTerm:
    """Return equation 5 for h [B, T, D] and e of the batch's items [U, D].

    In-batch negatives are the items of the pool that the window's user did not click; hard
    negatives are used only at their own step.
    """
    window, step = _places(batch, objective)
    content = batch.item_content[batch.item_index]  # [B, T]
    hard = hard_negative_mask(
        batch.item_content[batch.hard_index], batch.hard_mask, content, batch.item_mask
    )[window, step]
    queries = model.query_vectors(interest[window, step])  # [N, D]
    vectors, candidates = model.index_vectors(items), model.index_vectors(pool.vectors.float())
    positive = (queries * vectors[batch.item_index[window, step]]).sum(-1)
    exposed = torch.einsum("nd,nhd->nh", queries, vectors[batch.hard_index[window, step]])
    users = torch.arange(len(content), device=content.device)
    free = in_batch_mask(pool.content, content, batch.item_mask, users)  # [B, P]
    hard_weight = hard_weight_at(objective, progress)

    def losses(
        queries: Tensor, positive: Tensor, exposed: Tensor, candidates: Tensor,
        hard: Tensor, window: Tensor,
    ) -> Tensor:  # fmt: skip
        in_batch = queries @ candidates.T
        if pool.log_chance is not None:
            in_batch = in_batch - pool.log_chance
        scores = torch.cat([exposed, in_batch], 1)
        weights = pair_weights(
            hard, free[window], objective.act_reduction, hard_weight, objective.batch_weight
        )
        return ACTION_LOSSES[objective.action_loss](positive, scores, weights).sum()

    size = max(1, MAX_PAIRS // max(1, len(candidates)))
    total, survived = queries.new_zeros(()), torch.stack([hard.sum(), free.sum(1)[window].sum()])
    for begin in range(0, len(window), size) or (0,):
        part = slice(begin, begin + size)
        inputs = (queries[part], positive[part], exposed[part], candidates, hard[part],
                  window[part])  # fmt: skip
        if len(window) <= size:
            total = total + losses(*inputs)
        else:
            total = total + cast(Tensor, checkpoint(losses, *inputs, use_reentrant=False))
    return ActionTerm(total, survived.float())


def observe_items(model: InterestModel, items: Tensor) -> None:
    """Update the generator's statistics from a step's embeddings [G, D], equal on all workers."""
    if model.generator is not None:
        model.generator.observe(items.detach())


def generated_loss(
    model: InterestModel, batch: Batch, interest: Tensor, items: Tensor,
    objective: ObjectiveConfig, count: Tensor,
) -> Tensor | None:  # fmt: skip
    """Return this part's share of the global mean over the `count` trained steps of L_act.

    Takes h [B, T, D] and e of the batch's items [U, D]; None if the model has no generator.
    """
    if model.generator is None:
        return None
    window, step = _places(batch, objective)
    own = host_of(batch.row_key)[host_of(window)]
    keys = hashed(own.numpy(), host_of(step).numpy())
    targets = items[batch.item_index[window, step]]
    with torch.autocast(interest.device.type, enabled=False):
        values = model.generator.losses(interest[window, step].float(), targets, keys)
    return values.sum() / count

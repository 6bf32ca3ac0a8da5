"""The generator's loss of a joint step (METHOD 1.12).

Legend: B windows, T steps, U items, G items of all workers, N trained steps, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from karma_ray.data.batch import Batch
from karma_ray.data.draws import hashed
from karma_ray.model.interest import InterestModel
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.action_term import trained_steps


def observe_items(model: InterestModel, items: Tensor) -> None:
    """Let the generator follow the embeddings [G, D] of a step, the same on every worker."""
    if model.generator is not None:
        model.generator.observe(items.detach())


def generated_loss(
    model: InterestModel, batch: Batch, interest: Tensor, items: Tensor,
    objective: ObjectiveConfig, count: Tensor,
) -> Tensor | None:  # fmt: skip
    """This part's share of the global mean over `count` trained steps, those of L_act.

    h [B, T, D] and e of the batch's items [U, D]; None of a model without a generator.
    """
    if model.generator is None:
        return None
    window, step = trained_steps(batch, objective.act_positions).nonzero(as_tuple=True)
    keys = hashed(batch.row_key[window].cpu().numpy(), step.cpu().numpy())
    targets = items[batch.item_index[window, step]]
    with torch.autocast(interest.device.type, enabled=False):
        values = model.generator.losses(interest[window, step].float(), targets, keys)
    return values.sum() / count

"""The training step of a baseline over item ids: the action loss on KARMA's batches and pool.

Legend: B windows, T steps, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from karma_ray.baselines.sequential import IdModel
from karma_ray.data.batch import Batch
from karma_ray.metrics.collapse import spread
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.action_term import Pool, action_term, trained_steps
from karma_ray.training.item_table import SharedBatch, share_items
from karma_ray.training.parallel import global_sum
from karma_ray.training.step import StepOutput
from karma_ray.training.step_state import AT_THE_END, StepState


@dataclass(frozen=True)
class ActionStep:
    """L_act (equation 5), summed as in `JointStep` without any decodability term."""

    objective: ObjectiveConfig

    def __call__(self, model: nn.Module, batch: Batch, state: StepState = AT_THE_END) -> StepOutput:
        """Return the action loss of one batch."""
        assert isinstance(model, IdModel)
        shared = share_items(batch)
        batch, items = shared.batch, shared.encoded(model.interest.encode_items)
        pool = Pool.of(shared, items, self.objective, state)
        interest = model.interest.interest(batch, items)
        trained = trained_steps(batch, self.objective.act_positions).sum()
        count = global_sum(trained).clamp(min=1)
        with torch.autocast(interest.device.type, enabled=False):
            action = action_term(
                model.interest, batch, interest, items.float(), pool, self.objective,
                state.progress,
            )  # fmt: skip
        loss = action.loss / count
        values = torch.cat([loss.detach().float()[None], action.negatives / count])
        total, hard, in_batch = global_sum(values)
        logs: dict[str, Tensor | float] = {
            "loss/action": total,
            "loss/total": total,
            "negatives/hard_per_step": hard,
            "negatives/surviving": hard + in_batch,
            **_work_done(model, shared, float(trained)),
        }
        return StepOutput(loss, logs)

    @torch.no_grad()
    def probe(
        self, model: nn.Module, batch: Batch, state: StepState = AT_THE_END
    ) -> dict[str, float]:
        """Return effective rank and mean cosine of e and h; ids have no text to decode."""
        assert isinstance(model, IdModel)
        shared = share_items(batch)
        items = shared.encoded(model.interest.encode_items)
        return spread(items, model.interest.interest(shared.batch, items)[batch.loss_mask])


def _work_done(model: IdModel, shared: SharedBatch, trained: float) -> dict[str, Tensor | float]:
    """Return this worker's counts; `flops` covers dense layers and scores, both passes."""
    steps = shared.batch.step_mask.sum()
    dense = sum(value.numel() for value in model.interest.network.parameters())
    scores = model.interest.width * trained * len(shared.pool)
    return {
        "negatives/pool": float(len(shared.pool)),
        "tokens": float(2 * steps),
        "examples": float(shared.batch.num_windows),
        "flops": float(6 * dense * 2 * steps + 6 * scores),
    }

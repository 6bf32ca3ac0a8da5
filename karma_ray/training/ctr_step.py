"""The training step of CTR models: the terms of the objective, each a mean over all workers.

Legend: N candidates of this worker.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from karma_ray.ranking.batch import CtrBatch
from karma_ray.ranking.load import logits_of
from karma_ray.ranking.objective import CLICKS, Term
from karma_ray.training.parallel import global_sum
from karma_ray.training.step import StepOutput
from karma_ray.training.step_state import AT_THE_END, StepState


@dataclass(frozen=True)
class CtrStep:
    """L = sum over terms of weight x mean of the term's values."""

    terms: tuple[Term, ...] = (CLICKS,)

    def __call__(
        self, model: nn.Module, batch: CtrBatch, state: StepState = AT_THE_END
    ) -> StepOutput:
        """Return this worker's share of the loss, and the global loss of every term."""
        logits = logits_of(model, batch)
        loss, logs = logits.new_zeros(()), dict[str, Tensor | float]()
        for term in self.terms:
            values = term.values(model, batch, logits)
            count = global_sum(torch.tensor(float(values.numel()), device=values.device))
            share = values.sum() / count
            loss = loss + term.weight * share
            logs[f"loss/{term.name}"] = global_sum(share)
        logs["loss/total"] = global_sum(loss)
        logs["examples"] = float(batch.num_candidates)
        return StepOutput(loss, logs)

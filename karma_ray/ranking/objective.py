"""The terms of the objective of CTR models: values per example, which the step sums and weighs.

Legend: R pages, N candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from karma_ray.ranking.batch import CtrBatch


@dataclass(frozen=True)
class Term:
    """One term: its mean over all examples of all workers is weighed and added."""

    name: str
    """Name in the logs, after `loss/`."""
    weight: float
    values: Callable[[nn.Module, CtrBatch, Tensor], Tensor]
    """(model, batch, logits [N]) -> the term's value of every example, [N] or [R]."""


def log_loss(model: nn.Module, batch: CtrBatch, logits: Tensor) -> Tensor:  # -> [N]
    """Return -log of the probability that the model gave to what happened."""
    return F.binary_cross_entropy_with_logits(logits, batch.clicked, reduction="none")


CLICKS = Term("click", 1.0, log_loss)
"""The term that every family has."""

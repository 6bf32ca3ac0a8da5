"""The state of a training step: the progress of the training, a bank of items, click shares."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepState:
    """Inputs of a step besides model and batch; the defaults are those at the end of training."""

    progress: float = 1.0
    """Share of the training that is done, for schedules of the objective."""
    bank: Tensor | None = None
    """Cached embeddings [I, D] of the whole catalogue, if the encoder gets no gradient, or the
    features [I, d_item + K] that they are made of, if only the encoder's head does."""
    shares: Tensor | None = None
    """Share [I] of the training clicks on each item's content, if `objective.logq` needs it."""


AT_THE_END = StepState()

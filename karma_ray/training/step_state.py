"""What a step is given besides model and batch: how far the training is, and a bank of items."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepState:
    """The default is that of a training's end, as measurements want it."""

    progress: float = 1.0
    """Share of the training done, for schedules of the objective."""
    bank: Tensor | None = None
    """Cached embeddings [I, D] of the whole catalogue, where the encoder gets no gradient."""
    shares: Tensor | None = None
    """Share [I] of the training clicks on each item's content, where `objective.logq` needs it."""


AT_THE_END = StepState()

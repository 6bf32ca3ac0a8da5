"""Floors of a CTR model: the click rate of all items, and that of each item, with smoothing.

Legend: I items, n shown items of a page table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from karma_ray.data.fragments import row_blocks
from karma_ray.data.steps import flattened
from karma_ray.metrics.clicks import log_loss
from karma_ray.ranking.exposures import Exposures
from karma_ray.ranking.judged import Judged

STRENGTHS = (5.0, 20.0, 100.0, 500.0)
"""Exposures at the common rate that an item is given, of which validation chooses."""


@dataclass(frozen=True)
class ItemRates:
    """How often every item was shown and clicked on the training pages."""

    shown: NDArray[np.float64]  # [I]
    clicked: NDArray[np.float64]  # [I]
    strength: float = STRENGTHS[0]

    @classmethod
    def count(cls, exposures: Exposures, num_items: int) -> ItemRates:
        """Count the training pages."""
        shown, hits = np.zeros(num_items), np.zeros(num_items)
        for rows in row_blocks(exposures.split("train"), ["candidate_rows", "clicked"]):
            items = flattened(rows.column("candidate_rows")).to_numpy()
            clicked = flattened(rows.column("clicked")).to_numpy(zero_copy_only=False)
            shown += np.bincount(items, minlength=num_items)
            hits += np.bincount(items, clicked, num_items)
        return cls(shown, hits)

    @property
    def common(self) -> float:
        """The click rate of all shown items."""
        return float(self.clicked.sum() / max(1.0, self.shown.sum()))

    @property
    def rates(self) -> NDArray[np.float64]:  # [I]
        """The smoothed rate of each item: (clicks + a c) / (shown + a), c the common rate."""
        smoothed: NDArray[np.float64] = (self.clicked + self.strength * self.common) / (
            self.shown + self.strength
        )
        return smoothed

    @property
    def is_warm(self) -> NDArray[np.bool_]:  # [I]
        """Whether training pages showed an item."""
        return self.shown > 0

    def fitted(self, valid: Judged) -> ItemRates:
        """Return the rates with the strength that has the least log loss on validation."""
        if not len(valid.row):
            return self
        choices = [replace(self, strength=strength) for strength in STRENGTHS]
        return min(choices, key=lambda c: log_loss(c.rates[valid.row], valid.clicked).mean())

"""How many items every stage keeps: the paper's numbers, or the same shares of a small catalogue.

A catalogue of a few thousand items would pass whole through a list of 5,000, so that every vector
had a hit rate of 100 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

RECALLED = 5000
"""Items of the recall stage in the paper (HR@5000)."""
RECALLED_SHARE = 0.02
"""Share of a small catalogue that is recalled."""
POOL = 5000
"""Candidates of the pre-ranker, on a large catalogue."""
POOL_SHARE = 0.2
"""Candidates of the pre-ranker as a share of a small catalogue."""
KEPT_SHARE = 0.1
"""Share of its candidates that the pre-ranker keeps: 500 of 5,000, as in the paper."""


@dataclass(frozen=True)
class Sizes:
    """The lengths of the lists, and what the metrics are called."""

    recalled: int
    """K of the recall stage."""
    pool: int
    """Candidates of the pre-ranker."""
    kept: int
    """Candidates that the pre-ranker keeps."""

    @classmethod
    def of(cls, num_items: int) -> Sizes:
        """Return the sizes for a catalogue of `num_items`."""
        recalled = math.ceil(RECALLED_SHARE * num_items)
        pool = min(POOL, max(1, round(POOL_SHARE * num_items)))
        return cls(min(RECALLED, recalled), pool, max(1, round(KEPT_SHARE * pool)))

    @property
    def recall_metric(self) -> str:
        """`HR@5000`, or `HR@2%` where 2 % of the catalogue are fewer."""
        return f"HR@{RECALLED}" if self.recalled == RECALLED else f"HR@{RECALLED_SHARE:.0%}"

    @property
    def prerank_metric(self) -> str:
        """`HR@500`, or `HR@10%` (of the pool) where the pool is smaller than 5,000."""
        return f"HR@{self.kept}" if self.pool == POOL else f"HR@{KEPT_SHARE:.0%}"

    @property
    def merged(self) -> int:
        """Length of the merged list that both stages are made from."""
        return max(self.recalled, self.pool)

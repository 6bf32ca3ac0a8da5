"""Similarity of candidates to a history: largest, mean, mean of the five largest, and tiers.

Legend: n candidates, T history.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_TIERS = 10
"""Ranges of the cosine, of width 0.2 from -1 to 1; the last one has its upper end."""
NUM_TOP = 5


@dataclass(frozen=True)
class Similarity:
    """The similarities of n candidates; all 0 for an empty history."""

    max: NDArray[np.float32]  # [n]
    mean: NDArray[np.float32]  # [n]
    top5: NDArray[np.float32]  # [n]
    counts: NDArray[np.float32]  # [n, NUM_TIERS] items of the history in each tier

    @classmethod
    def of(
        cls, cosines: NDArray[np.float32], there: NDArray[np.bool_] | None = None
    ) -> Similarity:  # [n, T], [n, T]
        """Summarise cosines; `there` (default: all) says where a history has an item."""
        if there is None:
            there = np.ones(cosines.shape, bool)
        sizes = there.sum(1)
        tier = np.clip(((cosines + 1) / 2 * NUM_TIERS).astype(int), 0, NUM_TIERS - 1)
        place = np.arange(len(cosines))[:, None] * NUM_TIERS + tier
        counts = np.bincount(place[there], minlength=len(cosines) * NUM_TIERS)
        best = -np.sort(np.where(there, -cosines, np.inf), axis=1)[:, :NUM_TOP]
        best = np.where(np.isfinite(best), best, 0.0)
        nothing = np.zeros(len(cosines), np.float32)
        return cls(
            max=best[:, 0].astype(np.float32) if best.shape[1] else nothing,
            mean=_mean(np.where(there, cosines, 0.0), sizes),
            top5=_mean(best, np.minimum(sizes, NUM_TOP)),
            counts=counts.reshape(-1, NUM_TIERS).astype(np.float32),
        )


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return vectors of length 1; those of length 0 are kept."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: NDArray[np.float32] = vectors / np.maximum(lengths, 1e-12)
    return found


def _mean(values: NDArray[np.float32], counts: NDArray[np.int64]) -> NDArray[np.float32]:
    means: NDArray[np.float32] = (values.sum(1) / np.maximum(counts, 1)).astype(np.float32)
    return means

"""Similarity of a candidate to the history, as features of a CTR model (method 1.13).

    s_j = cos(e_hist_j, e_candidate)
    SimTier: 10 bins of [-1, 1]; log(count + 1) x a learned number of the bin (2407.19467)
    largest, mean, and mean of the five largest s_j; optionally h_t . e_candidate

Legend: N candidates, T history, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from karma_ray.retrieval.similarity import NUM_TIERS, Similarity

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_SUMMARIES = 3
LEAST = 1e-3
"""Smallest deviation that a feature is divided by."""


@dataclass(frozen=True)
class FeatureMoments:
    """Mean and deviation of every feature on training pages, [F] each."""

    mean: list[float]
    deviation: list[float]

    @classmethod
    def of(cls, features: NDArray[np.float32]) -> FeatureMoments:  # [n, F]
        """Compute them for some candidates."""
        values = features.astype(np.float64)
        return cls(values.mean(0).tolist(), values.std(0).tolist())


def num_features(interest: bool) -> int:
    """F."""
    return NUM_TIERS + NUM_SUMMARIES + int(interest)


def similarity_features(
    cosines: NDArray[np.float32],
    there: NDArray[np.bool_],
    interest: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:  # [N, T], [N, T], [N] -> [N, F]
    """Return the features of candidates; `there` says where a history has an item."""
    found = Similarity.of(cosines, there)
    columns = [np.log1p(found.counts), *(x[:, None] for x in (found.max, found.mean, found.top5))]
    if interest is not None:
        columns.append(interest[:, None])
    return np.concatenate(columns, axis=1, dtype=np.float32)


class TierWeights(nn.Module):
    """Standardises features, and multiplies the log-counts of the tiers by learned numbers.

    Cosines of a trained encoder may all lie within 0.05, and scores h_t . e around 10.
    """

    def __init__(self, interest: bool) -> None:
        super().__init__()
        self.mean: Tensor
        self.deviation: Tensor
        self.others: Tensor
        self.tiers = nn.Parameter(torch.ones(NUM_TIERS))
        self.register_buffer("others", torch.ones(NUM_SUMMARIES + int(interest)))
        self.register_buffer("mean", torch.zeros(num_features(interest)))
        self.register_buffer("deviation", torch.ones(num_features(interest)))

    def know(self, moments: FeatureMoments) -> None:
        """Take mean and deviation of the training pages."""
        self.mean.copy_(torch.tensor(moments.mean))
        self.deviation.copy_(torch.tensor(moments.deviation).clamp(min=LEAST))

    def forward(self, features: Tensor) -> Tensor:
        """Weigh features.  # [N, F] -> [N, F]"""
        weights = torch.cat([self.tiers, self.others])
        return (features - self.mean) / self.deviation * weights

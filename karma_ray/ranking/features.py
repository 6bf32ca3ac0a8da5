"""Similarity of a candidate to the history, as features of a CTR model (method 1.13).

    s_j = cos(e_hist_j, e_candidate)
    SimTier: 10 bins of [-1, 1]; log(count + 1) x a learned number of the bin (2407.19467)
    largest, mean, and mean of the five largest s_j; optionally h_t . e_candidate

Legend: N candidates, T history, F features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from karma_ray.retrieval.similarity import NUM_TIERS, Similarity

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_SUMMARIES = 3


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
    """Multiplies the log-counts of the tiers by learned numbers; other features are unchanged."""

    def __init__(self, interest: bool) -> None:
        super().__init__()
        self.others: Tensor
        self.tiers = nn.Parameter(torch.randn(NUM_TIERS) * 0.1)
        self.register_buffer("others", torch.ones(NUM_SUMMARIES + int(interest)))

    def forward(self, features: Tensor) -> Tensor:
        """Weigh features.  # [N, F] -> [N, F]"""
        return features * torch.cat([self.tiers, self.others])

"""The ranking stage: what similarities of the item vectors add to a CTR model (method 1.13).

A DIN over ids is trained on exposures with the same seed and the same batches three times: without
KARMA, with similarity features of KARMA's vectors, and with those of action-only training. One
more arm of each run has h_t . e as a feature too. AUC and gAUC are over the test exposures.

Legend: n shown items.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from karma_ray.metrics.ranking import group_auc

Floats = NDArray[np.float64]


def auc_parts(
    scores: NDArray[np.floating], clicked: NDArray[np.bool_]
) -> tuple[Floats, Floats]:  # [n], [n] -> [n], [n]
    """Return values and weights per shown item whose weighted mean is the AUC over all pairs.

    A shown item's value is AUC + 2 (v - AUC), where v is the share of the items of the other kind
    that it is in the right order with, and clicks and others have half of the weight each. The mean
    is exact, and its change under a resampling of users is that of the AUC up to second order, as
    an AUC varies with its clicks and with its others (DeLong et al. 1988).
    """
    positive, negative = int(clicked.sum()), int((~clicked).sum())
    assert positive and negative, "an AUC compares clicks with others"
    twice = _twice_ranks(scores)  # among all
    share = np.empty(len(scores))
    below = (twice[clicked] - _twice_ranks(scores[clicked])) / 2
    share[clicked] = below / negative
    above = (twice[~clicked] - _twice_ranks(scores[~clicked])) / 2
    share[~clicked] = 1.0 - above / positive
    mean = float(share[clicked].mean())
    weights = np.where(clicked, len(scores) / (2 * positive), len(scores) / (2 * negative))
    return mean + 2 * (share - mean), weights


def gauc_parts(
    scores: NDArray[np.floating], clicked: NDArray[np.bool_], page: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Floats, Floats]:  # [n] each -> [G] each
    """Return page, AUC and weight (impressions, as in DIN) of every page with both kinds."""
    found = group_auc(scores, clicked, page)
    return found.groups, found.auc, found.weights("impressions")


def _twice_ranks(scores: NDArray[np.floating]) -> NDArray[np.int64]:  # [n] -> [n]
    """Return twice the mean rank of each score from below, equal ones sharing it."""
    _, which, counts = np.unique(scores, return_inverse=True, return_counts=True)
    before = np.cumsum(counts) - counts
    twice: NDArray[np.int64] = (2 * before + counts + 1)[which]
    return twice

"""Metrics of click probabilities over all shown items: AUC, log loss and calibration.

Legend: n shown items, G distinct scores, B resamples, K bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from karma_ray.metrics.ranking import group_auc
from karma_ray.metrics.significance import BootstrapResult, resamples

Floats = NDArray[np.float64]
NUM_BINS = 20
"""Bins of the reliability curve, with equally many shown items."""
_CELLS = 100_000_000
_FEWEST, _MOST = 200, 2000


def auc(scores: NDArray[np.floating], clicked: NDArray[np.bool_]) -> float:  # [n], [n]
    """Return P(s+ > s-) + 0.5 P(s+ = s-) over all pairs; NaN without clicks or without others."""
    found = group_auc(scores, clicked, np.zeros(len(scores), np.int64))
    return float(found.auc[0]) if len(found.auc) else float("nan")


def log_loss(chance: NDArray[np.floating], clicked: NDArray[np.bool_]) -> Floats:  # [n] -> [n]
    """Return -log of the probability given to what happened."""
    bounded = np.clip(chance.astype(np.float64), 1e-7, 1 - 1e-7)
    return -np.log(np.where(clicked, bounded, 1 - bounded))


@dataclass(frozen=True)
class Reliability:
    """Mean predicted and observed click rates of bins of shown items with similar predictions."""

    predicted: Floats  # [K]
    observed: Floats  # [K]
    count: NDArray[np.int64]  # [K]

    @classmethod
    def of(
        cls, chance: NDArray[np.floating], clicked: NDArray[np.bool_], num_bins: int = NUM_BINS
    ) -> Reliability:  # [n], [n]
        """Divide by rank of the prediction; equal predictions are in one bin."""
        values, which = np.unique(chance, return_inverse=True)
        counts = np.bincount(which, minlength=len(values))
        middle = np.cumsum(counts) - counts / 2
        bin_of = np.minimum(
            (middle * num_bins / max(1, len(chance))).astype(np.int64), num_bins - 1
        )
        count = np.bincount(bin_of[which], minlength=num_bins)
        kept, size = count > 0, np.maximum(count, 1)
        predicted = np.bincount(bin_of[which], chance, num_bins) / size
        observed = np.bincount(bin_of[which], clicked, num_bins) / size
        return cls(predicted[kept], observed[kept], count[kept])

    @property
    def error(self) -> float:
        """The expected calibration error: mean of |predicted - observed| over shown items."""
        total = max(1, int(self.count.sum()))
        return float((np.abs(self.predicted - self.observed) * self.count).sum() / total)


def auc_difference(
    left: NDArray[np.floating],
    right: NDArray[np.floating] | None,
    clicked: NDArray[np.bool_],
    user: NDArray[np.int64],
    seed: int,
    confidence: float = 0.95,
) -> BootstrapResult:  # [n], [n], [n], [n]
    """Bootstrap AUC(left) - AUC(right) over users drawn with replacement.

    `user` has numbers from 0 on. Without `right` it is the interval of the AUC itself. The number
    of resamples falls with n, from 2000 to 200.
    """
    return mean_auc_difference([left], None if right is None else [right], clicked, user, seed,
                               confidence)  # fmt: skip


def mean_auc_difference(
    left: Sequence[NDArray[np.floating]],
    right: Sequence[NDArray[np.floating]] | None,
    clicked: NDArray[np.bool_],
    user: NDArray[np.int64],
    seed: int,
    confidence: float = 0.95,
) -> BootstrapResult:  # S x [n], S x [n], [n], [n]
    """Bootstrap the mean over S seeds of the AUCs of `left` minus that of `right`, over users.

    A drawn user comes with what all seeds predicted for it.
    """
    num_users = int(user.max()) + 1
    count = int(np.clip(_CELLS // max(1, len(user)), _FEWEST, _MOST))
    counted = list(resamples(seed, num_users, count))
    draws = np.mean([_aucs(scores, clicked, user, counted) for scores in left], axis=0)
    whole = float(np.mean([auc(scores, clicked) for scores in left]))
    if right is not None:
        draws = draws - np.mean([_aucs(s, clicked, user, counted) for s in right], axis=0)
        whole -= float(np.mean([auc(scores, clicked) for scores in right]))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    fewer = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
    return BootstrapResult(
        whole, float(low), float(high), min(1.0, 2.0 * (fewer + 1) / (len(draws) + 1)), num_users
    )


def _aucs(
    scores: NDArray[np.floating], clicked: NDArray[np.bool_], user: NDArray[np.int64],
    counted: Iterable[NDArray[np.integer]],
) -> Floats:  # fmt: skip
    """Return the AUC of each resample [B]; `counted` are blocks [b, users] of draws."""
    order = np.argsort(scores, kind="stable")
    ranked, hit, owner = scores[order], clicked[order], user[order]
    ties = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    found = []
    for block in counted:
        for drawn in block:
            weight = drawn[owner].astype(np.float64)
            positive = np.add.reduceat(weight * hit, ties)
            negative = np.add.reduceat(weight * ~hit, ties)
            below = np.cumsum(negative) - negative / 2
            found.append((positive @ below) / max(positive.sum() * negative.sum(), 1e-300))
    return np.array(found)

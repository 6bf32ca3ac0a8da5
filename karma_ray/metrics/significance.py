"""Significance of the difference of two rankers: a paired bootstrap over users.

Clicks of one user are not independent, so users are resampled instead of clicks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BLOCK_CELLS = 4_000_000
_KEPT_CELLS = 20_000_000


@dataclass(frozen=True)
class BootstrapResult:
    """The difference of two means (left - right) with its bootstrap interval."""

    difference: float
    low: float
    high: float
    p_value: float
    """Two-sided p-value of the hypothesis of no difference; at least 1 / (resamples + 1)."""
    num_users: int


def paired_bootstrap(
    left: NDArray[np.float64],
    right: NDArray[np.float64],
    user_ids: Sequence[str | None],
    *,
    seed: int,
    weights: NDArray[np.float64] | None = None,
    num_resamples: int = 2000,
    confidence: float = 0.95,
) -> BootstrapResult:  # [n], [n], [n], [n]
    """Bootstrap sum(w (left - right)) / sum(w) over users drawn with replacement.

    `left` and `right` have one value per example of the same examples (a hit, a reciprocal rank)
    or per group (an AUC, with the group's weight in `weights`). The interval is the percentile
    interval; the p-value is 2 min(P(d* <= 0), P(d* >= 0)) with add-one smoothing.
    """
    assert len(left) == len(right) == len(user_ids) > 0, "the same examples under two rankers"
    weight = np.ones(len(left)) if weights is None else weights
    _, user = np.unique(np.asarray(user_ids, dtype=str), return_inverse=True)
    num_users = int(user.max()) + 1
    gains = np.bincount(user, weight * (left - right), num_users).astype(np.float64)
    mass = np.bincount(user, weight, num_users).astype(np.float64)
    draws = _resampled_means(gains, mass, seed, num_resamples)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    fewer = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
    return BootstrapResult(
        difference=float(gains.sum() / mass.sum()),
        low=float(low),
        high=float(high),
        p_value=min(1.0, 2.0 * (fewer + 1) / (num_resamples + 1)),
        num_users=num_users,
    )


def _resampled_means(
    gains: NDArray[np.float64], mass: NDArray[np.float64], seed: int, num_resamples: int
) -> NDArray[np.float64]:  # [users], [users] -> [num_resamples]
    means = [
        (counts @ gains) / np.maximum(counts @ mass, 1e-300)
        for counts in resamples(seed, len(gains), num_resamples)
    ]
    return np.concatenate(means)


def resamples(
    seed: int, num_users: int, num_resamples: int
) -> Iterable[NDArray[np.integer]]:  # -> blocks [size, users]
    """Return how often each user is drawn; small results are cached, as studies reuse them."""
    if num_users * num_resamples <= _KEPT_CELLS:
        return _kept_resamples(seed, num_users, num_resamples)
    return _drawn(seed, num_users, num_resamples)


@functools.lru_cache(maxsize=4)
def _kept_resamples(
    seed: int, num_users: int, num_resamples: int
) -> tuple[NDArray[np.integer], ...]:
    return tuple(block.astype(np.int16) for block in _drawn(seed, num_users, num_resamples))


def _drawn(seed: int, num_users: int, num_resamples: int) -> Iterator[NDArray[np.integer]]:
    generator = np.random.default_rng(seed)
    uniform = np.full(num_users, 1.0 / num_users)
    block = max(1, _BLOCK_CELLS // num_users)
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        yield generator.multinomial(num_users, uniform, size=size)

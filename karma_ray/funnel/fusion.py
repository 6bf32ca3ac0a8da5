"""Fusion of two scores per request: (1 - w) z(s_pre) + w z(s_karma) (method 1.13, ASH).

Legend: b requests, P candidates of each, n judged (request, item) pairs, W weights.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GRID = tuple(round(step * 0.05, 2) for step in range(21))
"""The weights w that validation chooses from: 0, 0.05, ..., 1."""
OUTSIDE = np.iinfo(np.int64).max
"""Rank of an item that is not among the candidates."""
Floats = NDArray[np.floating]
Rows = NDArray[np.int64]


def standardised(scores: Floats) -> NDArray[np.float64]:  # [b, P] -> [b, P]
    """Return z = (s - mean) / deviation of each request; 0 where all its scores are equal."""
    values = scores.astype(np.float64)
    values -= values.mean(axis=1, keepdims=True)
    deviation = values.std(axis=1, keepdims=True)
    # What is left of equal numbers after rounding is no deviation.
    flat = deviation <= 1e-12 * np.maximum(np.abs(scores).max(axis=1, keepdims=True), 1e-300)
    standard: NDArray[np.float64] = np.where(flat, 0.0, values / np.where(flat, 1.0, deviation))
    return standard


def fused(left: Floats, right: Floats, weight: float) -> NDArray[np.float64]:  # [b, P] -> [b, P]
    """Return (1 - w) left + w right; both are standardised."""
    result: NDArray[np.float64] = (1.0 - weight) * left + weight * right
    return result


def places(pool: Rows, request: Rows, row: Rows) -> Rows:  # [b, P], [n], [n] -> [n]
    """Return the column of each item among its request's candidates, or -1."""
    order = np.argsort(pool, axis=1)
    result = np.empty(len(row), np.int64)
    for number, (at, wanted) in enumerate(zip(request, row, strict=True)):
        mine = order[at]
        place = np.searchsorted(pool[at], wanted, sorter=mine)
        found = place < len(mine) and pool[at, mine[place]] == wanted
        result[number] = mine[place] if found else -1
    return result


def ranks(scores: Floats, request: Rows, place: Rows) -> Rows:  # [b, P], [n], [n] -> [n]
    """Return the rank of each place among the scores of its request, ties counted against it.

    The rank of place -1 is OUTSIDE.
    """
    known = np.flatnonzero(place >= 0)
    result = np.full(len(place), OUTSIDE, np.int64)
    at = request[known]
    own = scores[at, place[known]]
    result[known] = np.count_nonzero(scores[at] >= own[:, None], axis=1)
    return result


def best_weight(rates: Floats, grid: tuple[float, ...] = GRID) -> float:  # [W] -> scalar
    """Return the weight with the highest validation rate; of equal ones the smallest."""
    return grid[int(np.argmax(rates))]

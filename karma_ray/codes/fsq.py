"""Finite scalar quantisation (2309.15505): every dimension is bounded and rounded.

The values of a dimension with L levels are the L integers from -floor(L / 2) on; an even number has
no middle, so it is shifted by half a step. No codebook is fitted, so none can collapse.
Legend: n vectors, r dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

EPSILON = 1e-3
"""How much the bound stays below the outermost halves, which would round to one level more."""


def bounded(
    values: NDArray[np.floating], levels: Sequence[int]
) -> NDArray[np.float64]:  # [n, r] -> [n, r]
    """Bound each dimension by a tanh so that rounding gives its levels (the paper's `bound`)."""
    counts = np.asarray(levels, np.float64)
    half = (counts - 1) * (1 - EPSILON) / 2
    offset = np.where(counts % 2 == 1, 0.0, 0.5)
    shift = np.tan(offset / half)
    return np.asarray(np.tanh(values + shift) * half - offset, np.float64)


def digits(
    values: NDArray[np.floating], levels: Sequence[int]
) -> NDArray[np.int64]:  # [n, r] -> [n, r]
    """Return the level of each dimension, from 0 to L - 1."""
    lowest = np.asarray(levels) // 2
    return np.asarray(np.rint(bounded(values, levels)).astype(np.int64) + lowest)


def packed(found: NDArray[np.int64], levels: Sequence[int]) -> NDArray[np.int64]:  # [n, r] -> [n]
    """Return one integer for the levels of a vector; the first dimension counts single steps."""
    return np.asarray(found @ places(levels))


def unpacked(codes: NDArray[np.integer], levels: Sequence[int]) -> NDArray[np.int64]:  # -> [n, r]
    """Return the levels of each dimension that an integer stands for."""
    return np.asarray(codes[:, None] // places(levels) % np.asarray(levels))


def places(levels: Sequence[int]) -> NDArray[np.int64]:  # [r]
    """Return what one step of each dimension adds to the integer."""
    return np.cumprod([1, *levels[:-1]], dtype=np.int64)

"""The channels that count: popularity, and the attributes that a user clicked before.

Both give the scores of the floors in `baselines/`, whose lists have the items that match the query
first.

Legend: I items, A attributes, M matching items, V values of an attribute, T steps of a history.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
import scipy.sparse as sp

from karma_ray.baselines.affinity import POPULARITY_EPSILON, PRIOR_STEPS, attribute_columns

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    Rows = NDArray[np.int64]


_BLOCK = 65_536
"""Items whose affinity one sparse product computes; all blocks share its array of ones."""


@dataclass(frozen=True)
class Tastes:
    """Training clicks and attribute values of every item."""

    clicks: NDArray[np.int64]  # [I]
    order: NDArray[np.int32]  # [I] rows, most clicks first, equal ones by row
    codes: NDArray[np.int32]  # [I, A] the place of each attribute's value among all gains
    base: list[NDArray[np.float64]]
    """[V] of each attribute: the values' shares of the training clicks. Among the gains, each
    attribute has one more place, for items that lack it."""

    @classmethod
    def of(cls, items: pa.Table, clicks: NDArray[np.int64]) -> Tastes:
        """Read the attributes of a catalogue's table, in the order of the index."""
        columns: list[NDArray[np.int32]] = []
        base, start = [], 0
        for name in attribute_columns(items):
            found = pc.dictionary_encode(items.column(name)).combine_chunks().indices
            codes = pc.fill_null(found, -1).to_numpy().astype(np.int32)
            size = max(int(codes.max(initial=-1)) + 1, 1)
            has = codes >= 0
            mass = np.bincount(codes[has], clicks[has] + 1.0, size)
            base.append(mass / max(mass.sum(), 1.0))
            columns.append(np.where(has, codes, size) + start)
            start += size + 1
        places = np.array(columns, np.int32).reshape(len(columns), len(clicks)).T
        order = np.argsort(-clicks, kind="stable").astype(np.int32)
        return cls(clicks, order, np.ascontiguousarray(places), base)

    @cached_property
    def mean_log_clicks(self) -> float:
        """The mean of log(1 + clicks) over items with a click."""
        clicked = self.clicks[self.clicks > 0]
        return float(np.log1p(clicked).mean()) if len(clicked) else 0.0

    def gains(self, history: Rows) -> NDArray[np.float64]:  # [T] -> [sum of V + 1]
        """Return what each value of each attribute adds to the affinity; a missing one adds 0."""
        base, missing, sizes = self._places
        counts = np.bincount(self.codes[history].reshape(-1), minlength=len(base))
        known = np.repeat(len(history) - counts[missing], sizes)
        share = (counts + PRIOR_STEPS * base) / (known + PRIOR_STEPS)
        found: NDArray[np.float64] = np.log(share / base)
        found[missing] = 0.0
        return found

    @cached_property
    def _places(self) -> tuple[NDArray[np.float64], Rows, Rows]:
        """The base of every place of the gains, the places for items that lack an attribute, and
        how many places each attribute has."""
        sizes = np.array([len(base) + 1 for base in self.base], np.int64)
        base = np.concatenate([np.empty(0), *(np.append(base, 1.0) for base in self.base)])
        return base, np.cumsum(sizes) - 1, sizes

    def affinity(
        self, gains: NDArray[np.float64], rows: Rows | None = None
    ) -> NDArray[np.float64]:  # [M] -> [M], or [I]
        """Return the affinity of some items, or of all."""
        if rows is not None:
            of_rows: NDArray[np.float64] = gains[self.codes[rows]].sum(1)
            of_rows += self._tie_breaks[rows]
            return of_rows
        total = self._tie_breaks.copy()
        if not self.base:
            return total
        for start, block in zip(range(0, len(total), _BLOCK), self._blocks, strict=True):
            # A sparse product reads the gains without an array of them for every attribute.
            total[start : start + _BLOCK] += block @ gains
        return total

    @cached_property
    def _tie_breaks(self) -> NDArray[np.float64]:  # [I]
        """Less than any affinity, so that the clicks order what has the same one."""
        found: NDArray[np.float64] = self.clicks * (
            POPULARITY_EPSILON / (self.clicks[self.order[0]] + 1.0)
        )
        return found

    @cached_property
    def _blocks(self) -> list[sp.csr_array]:  # of [_BLOCK, sum of V + 1]
        """Which places each item has, as matrices that share their values and row ends."""
        size, width = min(_BLOCK, len(self.codes)), self.codes.shape[1]
        ones, ends = np.ones(size * width), np.arange(size + 1, dtype=np.int32) * np.int32(width)
        places, found = sum(len(base) + 1 for base in self.base), []
        for start in range(0, len(self.codes), _BLOCK):
            codes = self.codes[start : start + _BLOCK]
            parts = ones[: codes.size], codes.reshape(-1), ends[: len(codes) + 1]
            found.append(sp.csr_array(parts, shape=(len(codes), places), copy=False))
        return found

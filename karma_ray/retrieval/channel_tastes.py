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

from karma_ray.baselines.affinity import POPULARITY_EPSILON, PRIOR_STEPS, attribute_columns

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Tastes:
    """Training clicks and attribute values of every item."""

    clicks: NDArray[np.int64]  # [I]
    order: NDArray[np.int32]  # [I] rows, most clicks first, equal ones by row
    codes: NDArray[np.int32]  # [A, I] the value of each attribute; V where it is missing
    base: list[NDArray[np.float64]]
    """[V] of each attribute: the values' shares of the training clicks."""

    @classmethod
    def of(cls, items: pa.Table, clicks: NDArray[np.int64]) -> Tastes:
        """Read the attributes of a catalogue's table, in the order of the index."""
        columns, base = [], []
        for name in attribute_columns(items):
            found = pc.dictionary_encode(items.column(name)).combine_chunks().indices
            codes = pc.fill_null(found, -1).to_numpy().astype(np.int32)
            size = max(int(codes.max(initial=-1)) + 1, 1)
            has = codes >= 0
            mass = np.bincount(codes[has], clicks[has] + 1.0, size)
            base.append(mass / max(mass.sum(), 1.0))
            columns.append(np.where(has, codes, size).astype(np.int32))
        shape = (len(columns), len(clicks))
        order = np.argsort(-clicks, kind="stable").astype(np.int32)
        return cls(clicks, order, np.array(columns, np.int32).reshape(shape), base)

    @cached_property
    def mean_log_clicks(self) -> float:
        """The mean of log(1 + clicks) over items with a click."""
        clicked = self.clicks[self.clicks > 0]
        return float(np.log1p(clicked).mean()) if len(clicked) else 0.0

    def gains(self, history: Rows) -> list[NDArray[np.float64]]:  # [T] -> [V + 1] each
        """Return what each value of each attribute adds to the affinity; a missing one adds 0."""
        found = []
        for codes, base in zip(self.codes, self.base, strict=True):
            counts = np.bincount(codes[history], minlength=len(base) + 1)[: len(base)]
            share = (counts + PRIOR_STEPS * base) / (counts.sum() + PRIOR_STEPS)
            found.append(np.append(np.log(share / base), 0.0))
        return found

    def affinity(
        self, gains: list[NDArray[np.float64]], rows: Rows | None = None
    ) -> NDArray[np.float64]:  # [M] -> [M], or [I]
        """Return the affinity of some items, or of all."""
        most = self.clicks[self.order[0]] + 1.0
        clicks = self.clicks if rows is None else self.clicks[rows]
        total: NDArray[np.float64] = clicks / most * POPULARITY_EPSILON
        for codes, gain in zip(self.codes, gains, strict=True):
            total += gain.take(codes if rows is None else codes[rows])
        return total

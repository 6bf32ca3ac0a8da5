"""A personal floor: items with attributes that the user clicked before, among matching items.

It only counts and needs no training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp
from numpy.typing import NDArray

from karma_ray.baselines.histories import history_counts
from karma_ray.baselines.query_filter import behind_matches
from karma_ray.data.catalog import Catalog

if TYPE_CHECKING:
    from karma_ray.data.prepared import QueryMatches

_MAX_VALUES = 1000
PRIOR_STEPS = 5.0
POPULARITY_EPSILON = 1e-6


def attribute_columns(table: pa.Table) -> list[str]:
    """Return the `attr_*` columns if there are any, else brand, category and small text columns.

    Columns with fewer than two values cannot express a taste and are left out.
    """
    values = {n: pc.count_distinct(table.column(n)).as_py() for n in _candidates(table)}
    return [
        name
        for name, count in values.items()
        if count > 1 and (count < _MAX_VALUES or name in ("brand", "category"))
    ]


def _candidates(table: pa.Table) -> list[str]:
    declared = [name for name in table.column_names if name.startswith("attr_")]
    is_text = (pa.types.is_string, pa.types.is_large_string)
    strings = [f.name for f in table.schema if any(kind(f.type) for kind in is_text)]
    return declared or [name for name in strings if name not in ("item_id", "title", "text")]


class AffinityRanker:
    """sum over attributes of log((n_v + a p_v) / ((n + a) p_v)), n_v the history's count of v.

    p_v is the value's share of the training clicks (with one more click per item, so that none is
    0). The sum is the log-odds against the base rate, shrunk by a = 5 imagined steps. A value that
    the item lacks adds 0; ties are ordered by popularity.
    """

    def __init__(self, catalog: Catalog, matches: QueryMatches, clicks: NDArray[np.int64]) -> None:
        self._catalog, self._matches = catalog, matches
        self._popularity = clicks / (clicks.max() + 1.0) * POPULARITY_EPSILON  # [I]
        self._attributes: list[sp.csr_matrix] = []  # one-hot, each [I, V_c]
        self._base: list[NDArray[np.float64]] = []  # each [V_c]
        for name in attribute_columns(catalog.table):
            onehot = _one_hot(catalog.table.column(name))
            mass = onehot.T @ (clicks + 1.0)
            self._attributes.append(onehot)
            self._base.append(mass / max(mass.sum(), 1.0))

    def score(self, examples: pa.Table) -> NDArray[np.float32]:  # -> [b, I]
        """Return dense ranks of the affinity, with matching items above all others."""
        values = self._affinity(history_counts(examples, self._catalog))
        return behind_matches(values, examples, self._matches)

    def _affinity(self, history: sp.csr_matrix) -> NDArray[np.float64]:  # [b, I] -> [b, I]
        total = np.repeat(self._popularity[None, :], history.shape[0], axis=0)
        for onehot, base in zip(self._attributes, self._base, strict=True):
            counts = (history @ onehot).toarray()  # [b, V]
            steps = counts.sum(axis=1, keepdims=True)
            share = (counts + PRIOR_STEPS * base) / (steps + PRIOR_STEPS)
            total += (onehot @ np.log(share / base).T).T
        return total


def _one_hot(column: pa.ChunkedArray) -> sp.csr_matrix:  # [I] -> [I, V]
    codes = pc.fill_null(pc.dictionary_encode(column).combine_chunks().indices, -1).to_numpy()
    rows = np.flatnonzero(codes >= 0)
    shape = (len(codes), max(int(codes.max(initial=-1)) + 1, 1))
    return sp.csr_matrix((np.ones(len(rows)), (rows, codes[rows])), shape=shape)

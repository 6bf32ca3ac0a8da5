"""Floor: the attributes this user clicked before, behind a hard match of the query.

The honest personal floor (SCIENCE): no training, only counting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp
from numpy.typing import NDArray

from karma_ray.baselines.query_filter import behind_match
from karma_ray.data.catalog import Catalog

if TYPE_CHECKING:
    from karma_ray.data.prepared import QueryMatches

_MAX_VALUES = 1000
_PRIOR_STEPS = 5.0
_POPULARITY_EPSILON = 1e-6


def attribute_columns(table: pa.Table) -> list[str]:
    """`attr_*` if the catalogue has them, else brand, category and small string columns."""
    named = [name for name in table.column_names if name.startswith("attr_")]
    if named:
        return named
    is_text = (pa.types.is_string, pa.types.is_large_string)
    strings = [f.name for f in table.schema if any(kind(f.type) for kind in is_text)]
    small = [
        name
        for name in strings
        if name not in ("item_id", "title", "text", "brand", "category")
        and 1 < pc.count_distinct(table.column(name)).as_py() < _MAX_VALUES
    ]
    return [name for name in ("brand", "category") if name in strings] + small


class AffinityRanker:
    """sum over attributes of log((n_v + a p_v) / ((n + a) p_v)), n_v the history's count of v.

    p_v is the value's share of the training clicks (every item once more, so that none is 0):
    log-odds against the base rate, shrunk by a = 5 imagined steps. A value the item lacks adds
    0; ties go by popularity.
    """

    def __init__(self, catalog: Catalog, matches: QueryMatches, clicks: NDArray[np.int64]) -> None:
        self._catalog, self._matches = catalog, matches
        self._popularity = clicks / (clicks.max() + 1.0) * _POPULARITY_EPSILON  # [I]
        self._attributes: list[sp.csr_matrix] = []  # one-hot, each [I, V_c]
        self._base: list[NDArray[np.float64]] = []  # each [V_c]
        for name in attribute_columns(catalog.table):
            onehot = _one_hot(catalog.table.column(name))
            mass = onehot.T @ (clicks + 1.0)
            self._attributes.append(onehot)
            self._base.append(mass / max(mass.sum(), 1.0))

    def score(self, examples: pa.Table) -> NDArray[np.float32]:  # -> [b, I]
        """Dense ranks of the affinity, the matching items' lifted above all others."""
        scores = np.empty((examples.num_rows, self._catalog.num_items), dtype=np.float32)
        histories = examples.column("history_item_ids").to_pylist()
        for row, query in enumerate(examples.column("query").to_pylist()):
            values = self._affinity(self._catalog.rows(histories[row] or []))
            scores[row] = behind_match(values, self._matches.rows(query))
        return scores

    def _affinity(self, history: NDArray[np.int64]) -> NDArray[np.float64]:  # [T] -> [I]
        total: NDArray[np.float64] = self._popularity.copy()
        known = history[history >= 0]
        for onehot, base in zip(self._attributes, self._base, strict=True):
            counts = np.asarray(onehot[known].sum(axis=0), dtype=np.float64).ravel()
            share = (counts + _PRIOR_STEPS * base) / (counts.sum() + _PRIOR_STEPS)
            total += onehot @ np.log(share / base)
        return total


def _one_hot(column: pa.ChunkedArray) -> sp.csr_matrix:  # [I] -> [I, V]
    codes = pc.fill_null(pc.dictionary_encode(column).combine_chunks().indices, -1).to_numpy()
    rows = np.flatnonzero(codes >= 0)
    shape = (len(codes), max(int(codes.max(initial=-1)) + 1, 1))
    return sp.csr_matrix((np.ones(len(rows)), (rows, codes[rows])), shape=shape)

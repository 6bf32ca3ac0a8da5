"""Floors of a pretrained LLM without a single click: cosines of the texts' vectors.

Legend: b requests, I items, n texts, D width of the vectors, which have length 1 or are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from karma_ray.baselines.query_filter import behind_matches
from karma_ray.data.catalog import Catalog

if TYPE_CHECKING:
    from karma_ray.data.prepared import QueryMatches

DECAY = 0.9
"""Weight of a history item relative to the next newer one."""
QUERY_WEIGHT = 2.0
"""Weight of the query's cosine beside that of the history; of 0.5, 1, 2 and 4 the best on H&M."""


@dataclass(frozen=True)
class TextVectors:
    """The vectors of all items, and what makes those of other texts."""

    items: NDArray[np.float32]  # [I, D]
    encode: Callable[[Sequence[str]], NDArray[np.float32]]
    """Texts -> vectors [n, D]."""


class LlmRanker:
    """score = 2 cosine(query, item) + cosine(mean of the history's vectors, item).

    The newest item of the history has weight 1 in the mean, the one before it .9, and so on. A part
    that a request lacks adds 0.
    """

    def __init__(self, catalog: Catalog, vectors: TextVectors) -> None:
        self._catalog, self._vectors = catalog, vectors
        self._queries: dict[str, NDArray[np.float32]] = {}

    def score(self, examples: pa.Table) -> NDArray[np.float32]:  # -> [b, I]
        """Return weighted sums of two cosines; a request without query and history scores 0."""
        wanted = [query or "" for query in examples.column("query").to_pylist()]
        new = [q for q in dict.fromkeys(wanted) if q.strip() and q not in self._queries]
        if new:
            self._queries |= dict(zip(new, self._vectors.encode(new), strict=True))
        tastes = history_vectors(examples, self._catalog, self._vectors.items)
        for row, query in enumerate(wanted):
            if query in self._queries:
                tastes[row] += QUERY_WEIGHT * self._queries[query]
        scores: NDArray[np.float32] = tastes @ self._vectors.items.T
        return scores


class LlmAffinityRanker:
    """Items that match the query first, by their cosine to the mean of the history's vectors."""

    def __init__(self, catalog: Catalog, matches: QueryMatches, vectors: TextVectors) -> None:
        self._catalog, self._matches, self._vectors = catalog, matches, vectors

    def score(self, examples: pa.Table) -> NDArray[np.float32]:  # -> [b, I]
        """Return dense ranks of the cosine, with matching items above all others."""
        items = self._vectors.items
        values = history_vectors(examples, self._catalog, items) @ items.T
        return behind_matches(values, examples, self._matches)


def history_vectors(
    examples: pa.Table, catalog: Catalog, items: NDArray[np.float32]
) -> NDArray[np.float32]:  # -> [b, D]
    """Return the weighted mean of each history's vectors at length 1; 0 without known items."""
    found = np.zeros((examples.num_rows, items.shape[1]), np.float32)
    for row, ids in enumerate(examples.column("history_item_ids").to_pylist()):
        known = catalog.rows(ids or [])
        known = known[known >= 0]
        weights = np.power(DECAY, np.arange(len(known))[::-1], dtype=np.float32)  # newest: 1
        total = weights @ items[known]
        found[row] = total / max(float(np.linalg.norm(total)), 1e-12)
    return found

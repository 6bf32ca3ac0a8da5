"""Floors among items that match the query, in random order or by popularity.

A model that does not beat them has not shown that it uses the history.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from karma_ray.data.catalog import Catalog

if TYPE_CHECKING:
    from karma_ray.data.prepared import QueryMatches


def behind_match(
    values: NDArray[np.floating] | NDArray[np.int64], rows: NDArray[np.int64]
) -> NDArray[np.float32]:  # [I], [M] -> [I]
    """Return scores that rank `rows` first and otherwise keep the order and ties of `values`.

    Dense ranks are whole numbers, which float32 represents exactly (up to 8 million items).
    """
    ranks: NDArray[np.float32] = np.unique(values, return_inverse=True)[1].astype(np.float32)
    ranks[rows] += len(values)
    return ranks


def behind_matches(
    values: NDArray[np.floating] | NDArray[np.int64], examples: pa.Table, matches: QueryMatches
) -> NDArray[np.float32]:  # [b, I] -> [b, I]
    """Return `behind_match` of each request's values and the items that match its query."""
    queries = examples.column("query").to_pylist()
    rows = [behind_match(v, matches.rows(query)) for v, query in zip(values, queries, strict=True)]
    return np.stack(rows) if rows else values.astype(np.float32)


class QueryFilterRanker:
    """Matching items first, in an order that is drawn per request and seed.

    The order depends on keys of the request and the items, so it does not depend on the block
    size or on the order of examples or catalogue.
    """

    def __init__(self, catalog: Catalog, matches: QueryMatches, seed: int = 0) -> None:
        self._matches, self._seed = matches, seed
        self._item_keys = np.array([_key(item_id) for item_id in catalog.item_ids], np.uint64)

    def score(self, examples: pa.Table) -> NDArray[np.float32]:  # -> [b, I]
        """Return random numbers in [0, 1) for matching items and in [-1, 0) for others."""
        scores = np.empty((examples.num_rows, len(self._item_keys)), dtype=np.float32)
        names = ("user_id", "timestamp", "query", "history_item_ids")
        columns = [examples.column(name).to_pylist() for name in names]
        for row, request in enumerate(zip(*columns, strict=True)):
            noise = _uniform(self._item_keys ^ np.uint64(_key(repr((self._seed, *request)))))
            scores[row] = noise - 1.0
            rows = self._matches.rows(request[2])
            scores[row, rows] = noise[rows]
        return scores


class PopularQueryFilterRanker:
    """Matching items first, ordered by training clicks."""

    def __init__(self, clicks: NDArray[np.int64], matches: QueryMatches) -> None:
        self._clicks, self._matches = clicks, matches

    def score(self, examples: pa.Table) -> NDArray[np.float32]:  # -> [b, I]
        """Return dense popularity ranks, with matching items above all others."""
        values = np.broadcast_to(self._clicks, (examples.num_rows, len(self._clicks)))
        return behind_matches(values, examples, self._matches)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _uniform(keys: NDArray[np.uint64]) -> NDArray[np.float32]:  # [I] -> [I] in [0, 1)
    """Apply SplitMix64's finaliser, so that similar keys give independent-looking numbers."""
    mixed = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)

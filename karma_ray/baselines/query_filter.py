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
from karma_ray.data.draws import text_keys

if TYPE_CHECKING:
    from karma_ray.data.prepared import QueryMatches


def behind_match(
    values: NDArray[np.floating] | NDArray[np.int64], rows: NDArray[np.int64]
) -> NDArray[np.floating]:  # [I], [M] -> [I]
    """Return scores that rank `rows` first and otherwise keep the order and ties of `values`."""
    ranks = _dense_ranks(values)
    ranks[rows] += len(values)
    return ranks


def behind_matches(
    values: NDArray[np.floating], examples: pa.Table, matches: QueryMatches
) -> NDArray[np.floating]:  # [b, I] -> [b, I]
    """Return `behind_match` of each request's values and the items that match its query."""
    scores = np.empty(values.shape, _kind_of_ranks(values.shape[1]))
    for row, query in enumerate(examples.column("query").to_pylist()):
        scores[row] = behind_match(values[row], matches.rows(query))
    return scores


def _dense_ranks(
    values: NDArray[np.floating] | NDArray[np.int64],
) -> NDArray[np.floating]:  # [I] -> [I]
    """Return the rank of each value among the distinct ones."""
    ranks: NDArray[np.int64] = np.unique(values, return_inverse=True)[1]
    return ranks.astype(_kind_of_ranks(len(values)))


def _kind_of_ranks(num_items: int) -> type[np.floating]:
    """Return a type that holds whole numbers up to twice the items exactly."""
    return np.float32 if num_items <= 2**23 else np.float64


class QueryFilterRanker:
    """Matching items first, in an order that is drawn per request and seed.

    The order depends on keys of the request and the items, so it does not depend on the block
    size or on the order of examples or catalogue.
    """

    def __init__(self, catalog: Catalog, matches: QueryMatches, seed: int = 0) -> None:
        self._matches, self._seed = matches, seed
        self._item_keys = text_keys(catalog.each("item_id")).view(np.uint64)

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
        self._ranks, self._matches = _dense_ranks(clicks), matches

    def score(self, examples: pa.Table) -> NDArray[np.floating]:  # -> [b, I]
        """Return dense popularity ranks, with matching items above all others."""
        scores = np.tile(self._ranks, (examples.num_rows, 1))
        for row, query in enumerate(examples.column("query").to_pylist()):
            scores[row, self._matches.rows(query)] += len(self._ranks)
        return scores


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _uniform(keys: NDArray[np.uint64]) -> NDArray[np.float32]:  # [I] -> [I] in [0, 1)
    """Apply SplitMix64's finaliser, so that similar keys give independent-looking numbers."""
    mixed = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)

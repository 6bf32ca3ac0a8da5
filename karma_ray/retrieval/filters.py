"""Search for several requests at once, each with what it leaves out.

A request gets k items whenever so many are left: excluded items are made up for by as many more
candidates, and where an approximate index still finds too few, the request is searched for again
among the allowed items alone.

Legend: I items, B requests, K vectors of a request, D width, L candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from karma_ray.retrieval.index import ItemIndex
from karma_ray.retrieval.requests import Request

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]
    Rows = NDArray[np.int64]
    Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Filter:
    """Which items may answer a request."""

    exclude: frozenset[str] = frozenset()
    """Ids of items that are left out; unknown ids have no effect."""
    category: str | None = None
    """If given, only items of this category; it must be the category of an item."""

    def without_history(self, request: Request) -> Filter:
        """Return a filter that leaves out the items of a request's history too."""
        clicked = {item.item_id for item in request.history}
        return replace(self, exclude=self.exclude | clicked)

    def allowed(self, index: ItemIndex) -> Mask:  # [I]
        """Return which rows of an index may answer."""
        if self.category is None:
            mask = np.ones(index.num_items, bool)
        else:
            mask = index.of_category(self.category)
        if self.exclude:
            mask[[row for row, item in enumerate(index.item_ids) if item in self.exclude]] = False
        return mask


def filtered_search(
    index: ItemIndex,
    queries: Vectors,  # [B, K, D]
    filters: Sequence[Filter],
    ks: Sequence[int],
) -> list[tuple[list[int], list[float]]]:
    """Return rows and scores of the best items of each request, best first.

    There are `ks` of them for each request, or as many as its filter leaves. Raises InputError on
    an unknown category.
    """
    answers: list[tuple[list[int], list[float]]] = [([], [])] * len(queries)
    groups: dict[str | None, list[int]] = {}
    for number, one in enumerate(filters):
        groups.setdefault(one.category, []).append(number)
    for category, numbers in groups.items():
        allowed = None if category is None else index.of_category(category)
        most = max(ks[number] + len(filters[number].exclude) for number in numbers)
        found = _search(index, queries[numbers], most, allowed)
        for number, rows, scores in zip(numbers, *found, strict=True):
            one, k = filters[number], ks[number]
            kept = _kept(index, rows, scores, one.exclude)
            if one.exclude and len(kept[0]) < k and not index.is_exact:
                again, values = _search(index, queries[[number]], k, one.allowed(index))
                kept = _kept(index, again[0], values[0], frozenset())
            answers[number] = kept[0][:k], kept[1][:k]
    return answers


def _kept(
    index: ItemIndex, rows: Rows, scores: Vectors, exclude: frozenset[str]
) -> tuple[list[int], list[float]]:
    """Return the candidates [L] of one request that exist and are not left out."""
    keep = rows >= 0
    if exclude:
        keep[keep] = [index.item_ids[row] not in exclude for row in rows[keep]]
    return rows[keep].tolist(), scores[keep].tolist()


def _search(
    index: ItemIndex, queries: Vectors, k: int, allowed: Mask | None
) -> tuple[Rows, Vectors]:
    """Return the k best rows of each request and their scores [B, k]; queries [B, K, D].

    An item in several of the K lists counts once, with its best score.
    """
    count, lists, _ = queries.shape
    rows, scores = index.search(queries.reshape(count * lists, -1), k, allowed)
    if lists == 1:
        return rows, scores
    return merged(rows.reshape(count, -1), scores.reshape(count, -1), k)


def merged(rows: Rows, scores: Vectors, k: int) -> tuple[Rows, Vectors]:
    """Merge several lists per request: rows and scores [B, L] -> the k best [B, k], best first.

    An item in more than one list counts once, with its best score. Row -1 means none.
    """
    found = np.full((len(rows), k), -1, np.int64), np.zeros((len(rows), k), np.float32)
    for request, (places, values) in enumerate(zip(rows, scores, strict=True)):
        order = np.argsort(-values, kind="stable")
        order = order[places[order] >= 0]
        first = np.sort(np.unique(places[order], return_index=True)[1])[:k]
        found[0][request, : len(first)] = places[order[first]]
        found[1][request, : len(first)] = values[order[first]]
    return found

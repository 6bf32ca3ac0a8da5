"""Grouping of examples into requests, and the items shown on each request's page.

A request is one (user, page, query), and an example is one of its clicks. gAUC judges a request
once, on the clicked and the exposed but unclicked items of its page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from karma_ray.data.catalog import Catalog


@dataclass(frozen=True)
class Impressions:
    """Judged (request, item) pairs, all [n], ordered by `example`."""

    example: NDArray[np.int64]
    """The example whose scores are used for the pair: the first of its request."""
    row: NDArray[np.int64]
    """Catalogue row of the item."""
    clicked: NDArray[np.bool_]
    request: NDArray[np.int64]
    seen: NDArray[np.bool_]
    """Whether the item is in the request's history."""


def request_numbers(examples: pa.Table) -> NDArray[np.int64]:  # -> [b]
    """Return equal numbers for examples of one request; each example without a page is alone."""
    columns = [examples.column(name).to_pylist() for name in ("user_id", "page_id", "query")]
    numbers: dict[object, int] = {}
    keys: Sequence[object] = [
        ("no page", position) if key[1] is None else key
        for position, key in enumerate(zip(*columns, strict=True))
    ]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def is_repeat(examples: pa.Table) -> NDArray[np.bool_]:  # -> [b]
    """Whether the user clicked the target earlier, within the example's history."""
    targets = examples.column("positive_item_id").to_pylist()
    histories = examples.column("history_item_ids").to_pylist()
    pairs = zip(targets, histories, strict=True)
    return np.array([target in (history or []) for target, history in pairs], dtype=bool)


def impressions(examples: pa.Table, requests: NDArray[np.int64], catalog: Catalog) -> Impressions:
    """Return the shown items of every request: its clicks, and its unclicked exposed items.

    Items that are not in the catalogue are left out; an item in both lists counts as clicked.
    """
    pages = _pages(examples, requests)
    histories = examples.column("history_item_ids").to_pylist()
    ids: list[str] = []
    lengths: list[int] = []
    clicked: list[bool] = []
    seen: list[bool] = []
    for example, positives, negatives in pages.values():
        shown = [*positives, *(item for item in negatives if item not in positives)]
        history = set(histories[example] or [])
        ids += shown
        lengths.append(len(shown))
        clicked += [item in positives for item in shown]
        seen += [item in history for item in shown]
    firsts = np.array([page[0] for page in pages.values()], dtype=np.int64)
    numbers = np.array(list(pages), dtype=np.int64)
    rows = catalog.rows(ids)
    known = rows >= 0
    return Impressions(
        example=np.repeat(firsts, lengths)[known],
        row=rows[known],
        clicked=np.array(clicked, dtype=bool)[known],
        request=np.repeat(numbers, lengths)[known],
        seen=np.array(seen, dtype=bool)[known],
    )


def _pages(
    examples: pa.Table, requests: NDArray[np.int64]
) -> dict[int, tuple[int, dict[str, None], dict[str, None]]]:
    """request -> (first example, clicked ids, unclicked ids), in order of first appearance."""
    names = ("positive_item_id", "page_positive_ids", "hard_negative_ids")
    columns = zip(*(examples.column(name).to_pylist() for name in names), strict=True)
    pages: dict[int, tuple[int, dict[str, None], dict[str, None]]] = {}
    for position, (target, page_positives, negatives) in enumerate(columns):
        page = pages.setdefault(int(requests[position]), (position, {}, {}))
        page[1].update(dict.fromkeys([target, *(page_positives or [])]))
        page[2].update(dict.fromkeys(negatives or []))
    return pages


def sampled(examples: pa.Table, count: int, seed: int) -> pa.Table:
    """Return at most `count` examples, drawn from `seed`, in their original order."""
    return examples.take(pa.array(sampled_rows(examples.num_rows, count, seed)))


def sampled_rows(num: int, count: int, seed: int) -> NDArray[np.int64]:
    """Return the rows of `num` examples that `sampled` takes."""
    return np.sort(np.random.default_rng(seed).permutation(num)[:count])

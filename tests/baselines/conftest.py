"""A catalogue of eight items and the requests the floors are asked."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest

from karma_ray.data.catalog import Catalog
from karma_ray.data.prepared import QueryMatches
from karma_ray.data.schema import EXAMPLES, SEQUENCES

ITEMS = {
    "item_id": ["a", "b", "c", "d", "e", "f", "g", "h"],
    "title": [
        "red cotton shirt", "red wool shirt", "blue cotton shirt", "blue wool shirt",
        "red mug", "blue mug", "red clay mug", "green lamp",
    ],
    "text": [None] * 8,
    "brand": ["acme", "acme", "bolt", "bolt", "acme", "bolt", None, "bolt"],
    "category": ["shirt", "shirt", "shirt", "shirt", "mug", "mug", "mug", "lamp"],
    "colour": ["red", "red", "blue", "blue", "red", "blue", "red", "green"],
}  # fmt: skip

MakeRequests = Callable[[list[tuple[str | None, list[str]]]], pa.Table]


def make_catalog(order: list[int] | None = None) -> Catalog:
    schema = pa.schema([(name, pa.string()) for name in ITEMS])
    table = pa.table(ITEMS, schema=schema)
    return Catalog(table.take(order) if order else table)


@pytest.fixture
def catalog() -> Catalog:
    return make_catalog()


@pytest.fixture
def shuffled() -> tuple[Catalog, list[int]]:
    """The same catalogue with its rows in another order, and that order."""
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    return make_catalog(order), order


@pytest.fixture
def matches(catalog: Catalog) -> QueryMatches:
    return QueryMatches(catalog)


@pytest.fixture
def requests_table() -> MakeRequests:
    """(query, history) pairs -> a table of examples; targets and pages are left null."""

    def make(requests: list[tuple[str | None, list[str]]]) -> pa.Table:
        rows = [
            {"user_id": f"u{n}", "query": query, "history_item_ids": history}
            for n, (query, history) in enumerate(requests)
        ]
        return pa.Table.from_pylist(rows, schema=EXAMPLES)

    return make


@pytest.fixture
def sequences() -> pa.Table:
    """Clicks: b three times in a loss, a once, e once as context only, one unknown item."""
    rows = [
        {"item_ids": ["e", "b", "a"], "loss_mask": [False, True, True]},
        {"item_ids": ["b", "b", "zzz"], "loss_mask": [True, True, True]},
    ]
    return pa.Table.from_pylist(rows, schema=SEQUENCES)

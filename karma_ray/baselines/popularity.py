"""A floor: popularity, the number of training clicks; also click counts for other parts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from karma_ray.data.catalog import Catalog

CLICK_COLUMNS = ("item_ids", "loss_mask")
"""The columns of training windows that are read here."""


def training_clicks(
    windows: Iterable[pa.Table] | pa.Table, catalog: Catalog
) -> NDArray[np.int64]:  # -> [I]
    """Count the training clicks of every item: steps with `loss_mask`, so each counts once.

    `windows` is a table, or tables that are read one after the other.
    """
    result = np.zeros(catalog.num_items, dtype=np.int64)
    for part in _parts(windows):
        items, mask = _flat(part, "item_ids"), _flat(part, "loss_mask")
        _count(result, items.filter(pc.fill_null(mask, False)), catalog)
    return result


def click_shares(
    windows: Iterable[pa.Table] | pa.Table, catalog: Catalog
) -> NDArray[np.float32]:  # -> [I]
    """Return the share of training clicks on each item's content, of at least one click."""
    clicks, content = training_clicks(windows, catalog), catalog.content_ids
    counts = np.bincount(content, weights=clicks)[content]
    shares: NDArray[np.float32] = np.maximum(counts, 1) / max(clicks.sum(), 1)
    return shares.astype(np.float32)


def warm_mask(
    windows: Iterable[pa.Table] | pa.Table, catalog: Catalog
) -> NDArray[np.bool_]:  # -> [I]
    """Return the mask of items with a training click, as target or context; others are cold."""
    result = np.zeros(catalog.num_items, dtype=np.int64)
    for part in _parts(windows):
        _count(result, _flat(part, "item_ids"), catalog)
    return result > 0


class PopularityRanker:
    """The same list for every request: the most clicked items in training first."""

    def __init__(self, clicks: NDArray[np.int64]) -> None:
        self._scores = clicks.astype(np.float32)  # [I]

    def score(self, examples: pa.Table) -> NDArray[np.float32]:
        """Return scores [b, I], a read-only view of one row."""
        return np.broadcast_to(self._scores, (examples.num_rows, len(self._scores)))


def _parts(windows: Iterable[pa.Table] | pa.Table) -> Iterable[pa.Table]:
    return [windows] if isinstance(windows, pa.Table) else windows


def _flat(windows: pa.Table, name: str) -> pa.Array:
    return pc.list_flatten(windows.column(name).combine_chunks())


def _count(result: NDArray[np.int64], item_ids: pa.Array, catalog: Catalog) -> None:
    """Add the occurrences of ids to the counts [I]."""
    counted = pc.value_counts(item_ids)
    rows = catalog.rows(counted.field("values"))
    numbers = counted.field("counts").to_numpy()
    np.add.at(result, rows[rows >= 0], numbers[rows >= 0])

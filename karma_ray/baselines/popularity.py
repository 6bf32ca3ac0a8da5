"""A floor: popularity, the number of training clicks; also click counts for other parts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from karma_ray.data.catalog import Catalog


def training_clicks(sequences: pa.Table, catalog: Catalog) -> NDArray[np.int64]:  # -> [I]
    """Count the training clicks of every item: steps with `loss_mask`, so each counts once."""
    items, mask = _flat(sequences, "item_ids"), _flat(sequences, "loss_mask")
    return _counts(items.filter(pc.fill_null(mask, False)), catalog)


def click_shares(sequences: pa.Table, catalog: Catalog) -> NDArray[np.float32]:  # -> [I]
    """Return the share of training clicks on each item's content, of at least one click."""
    clicks, content = training_clicks(sequences, catalog), catalog.content_ids
    counts = np.bincount(content, weights=clicks)[content]
    shares: NDArray[np.float32] = np.maximum(counts, 1) / max(clicks.sum(), 1)
    return shares.astype(np.float32)


def warm_mask(sequences: pa.Table, catalog: Catalog) -> NDArray[np.bool_]:  # -> [I]
    """Return the mask of items with a training click, as target or context; others are cold."""
    return _counts(_flat(sequences, "item_ids"), catalog) > 0


class PopularityRanker:
    """The same list for every request: the most clicked items in training first."""

    def __init__(self, clicks: NDArray[np.int64]) -> None:
        self._scores = clicks.astype(np.float32)  # [I]

    def score(self, examples: pa.Table) -> NDArray[np.float32]:
        """Return scores [b, I], a read-only view of one row."""
        return np.broadcast_to(self._scores, (examples.num_rows, len(self._scores)))


def _flat(sequences: pa.Table, name: str) -> pa.Array:
    return pc.list_flatten(sequences.column(name).combine_chunks())


def _counts(item_ids: pa.Array, catalog: Catalog) -> NDArray[np.int64]:
    counted = pc.value_counts(item_ids)
    rows = catalog.rows(counted.field("values").to_pylist())
    numbers = counted.field("counts").to_numpy()
    result = np.zeros(catalog.num_items, dtype=np.int64)
    np.add.at(result, rows[rows >= 0], numbers[rows >= 0])
    return result

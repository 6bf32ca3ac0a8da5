"""Requests as tables with the columns that a model may read, and keys for their random draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import pyarrow as pa

from karma_ray.data.draws import text_keys
from karma_ray.data.schema import EXAMPLES
from karma_ray.data.steps import ItemRows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

REQUEST_SCHEMA = pa.schema(
    [
        EXAMPLES.field(name)
        for name in ("query", "history_queries", "history_item_ids", "history_timestamps")
    ]
)


@dataclass(frozen=True)
class HistoryItem:
    """One past click: the item, the query that led to it, and its time."""

    item_id: str
    query: str | None = None
    timestamp: datetime | None = None


@dataclass(frozen=True)
class Request:
    """The current query of a user, and past clicks, oldest first."""

    query: str | None = None
    history: Sequence[HistoryItem] = ()


def request_table(requests: Sequence[Request]) -> pa.Table:
    """Convert requests to the columns of `examples` that a model may read.

    A history with a time at every step is sorted by time; otherwise it is used in the given
    order, oldest first.
    """
    rows = []
    for request in requests:
        history = list(request.history)
        stamps = [item.timestamp for item in history]
        if all(stamp is not None for stamp in stamps):
            history.sort(key=lambda item: item.timestamp or datetime.min)
        rows.append(
            {
                "query": request.query,
                "history_queries": [item.query for item in history],
                "history_item_ids": [item.item_id for item in history],
                "history_timestamps": [item.timestamp for item in history],
            }
        )
    return pa.Table.from_pylist(rows, schema=REQUEST_SCHEMA)


def request_keys(examples: pa.Table, items: ItemRows, max_history: int) -> NDArray[np.int64]:  # [B]
    """Hash each request's query and the last `max_history` items of its history that `items`
    knows. It hashes ids, so that the order of the catalogue has no effect."""
    columns = (examples.column(name).to_pylist() for name in ("query", "history_item_ids"))
    texts = []
    for query, history in zip(*columns, strict=True):
        ids = history or []
        known = [item for item, row in zip(ids, items.rows(ids), strict=True) if row >= 0]
        texts.append("\x1f".join([query or "", *known[max(0, len(known) - max_history) :]]))
    return text_keys(texts)

"""A request as the columns of `examples` that a model may see, and the key of its random draws."""

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
    """One past click: the item, the query it was found with, and when."""

    item_id: str
    query: str | None = None
    timestamp: datetime | None = None


@dataclass(frozen=True)
class Request:
    """What a user asks now and what they clicked before, oldest first."""

    query: str | None = None
    history: Sequence[HistoryItem] = ()


def request_table(requests: Sequence[Request]) -> pa.Table:
    """Requests as the columns of `examples` that a model may see.

    A history with a time at every step is put in order of time; one without is taken as it
    comes, oldest first.
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
    """Hashes of a request's query and of the last `max_history` items of its history that `items`
    knows: by id, so that a catalogue in another order changes nothing."""
    columns = (examples.column(name).to_pylist() for name in ("query", "history_item_ids"))
    texts = []
    for query, history in zip(*columns, strict=True):
        ids = history or []
        known = [item for item, row in zip(ids, items.rows(ids), strict=True) if row >= 0]
        texts.append("\x1f".join([query or "", *known[max(0, len(known) - max_history) :]]))
    return text_keys(texts)

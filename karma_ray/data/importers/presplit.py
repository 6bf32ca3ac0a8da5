"""Tables of pre-split sources without times: `sequences` and `examples`, without invented times.

`timestamps` are null; only equal page ids say which steps must not see each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from karma_ray.data.config import PrepareConfig
from karma_ray.data.schema import EXAMPLES, SEQUENCES

MAX_HISTORY = PrepareConfig().max_history


@dataclass(frozen=True)
class Step:
    """One click of a history."""

    item_id: str
    page_id: str
    query: str | None = None
    hard_negative_ids: list[str] = field(default_factory=list)


def windows(
    user_id: str, steps: Sequence[Step], max_steps: int = MAX_HISTORY + 1
) -> Iterator[dict[str, Any]]:
    """Yield SEQUENCES rows of at most `max_steps` steps; each step has its loss in one row.

    Later windows begin with earlier steps as context, about half a window.
    """
    start, stride = 0, max(1, max_steps // 2)
    while start < len(steps):
        stop = min(len(steps), start + (max_steps if start == 0 else stride))
        first = max(0, stop - max_steps)
        shown = steps[first:stop]
        yield {
            "user_id": user_id,
            "queries": [step.query for step in shown],
            "item_ids": [step.item_id for step in shown],
            "timestamps": None,
            "page_ids": [step.page_id for step in shown],
            "hard_negative_ids": [step.hard_negative_ids for step in shown],
            "loss_mask": [position >= start for position in range(first, stop)],
        }
        start = stop


def page_examples(
    user_id: str,
    history: Sequence[Step],
    page: Sequence[Step],
    max_history: int = MAX_HISTORY,
) -> Iterator[dict[str, Any]]:
    """Yield the EXAMPLES rows of one page: one per click, with the history before the page."""
    shown = history[-max_history:]
    for step in page:
        yield {
            "user_id": user_id,
            "timestamp": None,
            "query": step.query,
            "page_id": step.page_id,
            "page_positive_ids": [other.item_id for other in page],
            "history_queries": [past.query for past in shown],
            "history_item_ids": [past.item_id for past in shown],
            "history_timestamps": None,
            "positive_item_id": step.item_id,
            "hard_negative_ids": step.hard_negative_ids,
        }


def sequence_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return rows of `windows` as a table."""
    return pa.Table.from_pylist(rows, schema=SEQUENCES)


def example_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return rows of `page_examples` as a table."""
    return pa.Table.from_pylist(rows, schema=EXAMPLES)

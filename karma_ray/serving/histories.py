"""From a request's history to the steps that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from karma_ray.model.incremental import Step

if TYPE_CHECKING:
    from karma_ray.retrieval.encode import ItemTable
    from karma_ray.retrieval.requests import HistoryItem


def steps_of(history: Sequence[HistoryItem], table: ItemTable, limit: int) -> list[Step]:
    """Return the steps of a history that the model reads; unknown items are left out.

    The rules are those of `request_table` and `Steps.of`: clicks are sorted if all have a time,
    and neighbours of equal time form a group. Beyond `limit` steps see `window_start`.
    """
    clicks = in_time(history)
    steps: list[Step] = []
    group, last_group, before = 0, -1, None
    for place, click in enumerate(clicks):
        if click.timestamp is None or click.timestamp != before:
            group = place
        before = click.timestamp
        row = table.row(click.item_id)
        if row >= 0:
            steps.append(Step(row, click.query or "", group == last_group))
            last_group = group
    first = window_start(len(steps), limit)
    if first == 0:
        return steps
    return [steps[first]._replace(joined=False), *steps[first + 1 :]] if limit else []


def in_time(history: Sequence[HistoryItem]) -> list[HistoryItem]:
    """Return clicks oldest first: sorted if all have a time, as they are otherwise."""
    clicks = list(history)
    if all(click.timestamp is not None for click in clicks):
        clicks.sort(key=lambda click: click.timestamp)  # type: ignore[arg-type,return-value]
    return clicks


def window_start(count: int, limit: int) -> int:
    """Return the first step that is read of `count`, for a model trained on at most `limit`.

    A window that slid with every click would never find its stored keys and values. So beyond
    `limit` steps it begins anew with about half as many, and grows to `limit` again: longer windows
    than the model was trained on cost more recall (docs/log.md, L50). It depends on the count
    alone, so all replicas agree.
    """
    if limit == 0:
        return count
    half = (limit + 1) // 2
    return -(-max(0, count - limit) // half) * half

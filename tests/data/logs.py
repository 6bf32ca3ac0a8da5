"""Small logs for the data tests: rows by hand, and a random shop with every awkward case."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from karma_ray.data.schema import EVENTS, ITEMS

START = datetime(2024, 1, 1, tzinfo=UTC)


def at(hours: float) -> datetime:
    return START + timedelta(hours=hours)


def event(
    user: str | None,
    hours: float | None,
    clicked: list[str | None] | None,
    exposed: list[str | None] | None = None,
    query: str | None = "q",
    session: str | None = None,
    purchased: list[str] | None = None,
) -> dict[str, Any]:
    return {
        "user_id": user,
        "timestamp": None if hours is None else at(hours),
        "query": query,
        "exposed_item_ids": exposed,
        "clicked_item_ids": clicked,
        "purchased_item_ids": purchased,
        "session_id": session,
    }


def events_table(rows: list[dict[str, Any]]) -> pa.Table:
    columns = {name: [row[name] for row in rows] for name in EVENTS.names}
    return pa.table({name: pa.array(columns[name], EVENTS.field(name).type) for name in columns})


def items_table(num_items: int) -> pa.Table:
    rows = [{"item_id": f"i{n}", "title": f"thing {n}"} for n in range(num_items)]
    return pa.Table.from_pylist(rows, schema=ITEMS)


def random_events(
    seed: int, num_pages: int = 400, num_users: int = 25, num_items: int = 60
) -> pa.Table:
    """Pages with tied times, repeated rows, sessions, no clicks and several clicks."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(num_pages):
        shown = [f"i{n}" for n in generator.choice(num_items, size=8, replace=False)]
        clicked = [item for item in shown if generator.random() < 0.25]
        session = f"s{generator.integers(4)}" if generator.random() < 0.5 else None
        query = [None, "", "red", "blue"][generator.integers(4)]
        hours = int(generator.integers(200))  # few moments, so that times tie
        user = f"u{min(generator.integers(num_users), generator.integers(num_users))}"
        rows.append(event(user, hours, clicked, shown, query, session))
        if generator.random() < 0.05:
            rows.append(rows[-1])
    return events_table(rows)

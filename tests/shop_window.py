"""A tiny run whose data folder can be shown: pictures, training windows and test examples."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from karma_ray.artifacts import join, write_json, write_table
from karma_ray.data.schema import EXAMPLES, ITEMS, SEQUENCES
from tests import tiny_run

EVIL_TITLE = "<img src=x onerror=\"document.title='taken'\"> & mug"
EVIL_ID = "i8"
START = datetime(2024, 1, 1, tzinfo=UTC)


def _picture(number: int) -> bytes:
    content = io.BytesIO()
    colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
    Image.new("RGB", (30, 40), colour).save(content, "PNG")
    return content.getvalue()


def items_table() -> pa.Table:
    """The items of the tiny run with pictures: i30 has none, i31 a broken one, i8 an evil title."""
    rows = tiny_run_items().to_pylist()
    for number, row in enumerate(rows):
        row["image"] = {30: None, 31: b"no picture"}.get(number, _picture(number))
        if row["item_id"] == EVIL_ID:
            row["title"] = EVIL_TITLE
    return pa.Table.from_pylist(rows, schema=ITEMS)


tiny_run_items = tiny_run.items_table


def _times(count: int) -> list[datetime]:
    return [START + timedelta(hours=n) for n in range(count)]


def _window(user: str, items: list[str]) -> dict[str, object]:
    return {
        "user_id": user, "queries": ["mug"] * len(items), "item_ids": items,
        "timestamps": _times(len(items)), "page_ids": [f"p{n}" for n in range(len(items))],
        "hard_negative_ids": [[] for _ in items], "loss_mask": [True] * len(items),
    }  # fmt: skip


def _example(
    user: str, query: str, history: list[str], clicked: str, day: int
) -> dict[str, object]:
    return {
        "user_id": user, "timestamp": START + timedelta(days=day), "query": query, "page_id": "p",
        "page_positive_ids": [clicked], "history_queries": ["shirt"] * len(history),
        "history_item_ids": history, "history_timestamps": _times(len(history)),
        "positive_item_id": clicked, "hard_negative_ids": [],
    }  # fmt: skip


def write(root: Path) -> str:
    """Write run and data; i7 is the most clicked item, then i8, then i9. Returns RUN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_run, "items_table", items_table)
        run = tiny_run.write_run(root)
        data = tiny_run.write_data(root)
    windows = [
        _window("u1", ["i7", "i8", "i9"]),
        _window("u2", ["i7", "i8"]),
        _window("u3", ["i7"]),
    ]
    write_table(pa.Table.from_pylist(windows, schema=SEQUENCES), join(data, "sequences"))
    examples = [
        _example("u1", "early", ["i1"], "i3", 40),
        _example("u1", "red mug", ["i1", "i2", "gone"], "i7", 41),
        _example("u2", "lamp", [EVIL_ID, "i9"], "i12", 42),
        _example("new", "lamp", [], "i12", 42),
    ]
    table = pa.Table.from_pylist(examples, schema=EXAMPLES)
    write_table(table, join(data, "examples", "split=test"))
    write_json({"schema_version": 1}, join(data, "prepared.json"))
    return run

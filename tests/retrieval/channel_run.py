"""A tiny run with channels: 40 items with brands, and users who love one colour each."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa

from karma_ray.artifacts import RunFolder, join, write_json, write_table
from karma_ray.data.schema import EXAMPLES, SEQUENCES
from karma_ray.retrieval.encode import load_embeddings, save_embeddings
from karma_ray.retrieval.index_build import index_run
from tests import tiny_run

NOW = datetime(2024, 1, 1, tzinfo=UTC)
NUM_COLOURS = len(tiny_run.COLOURS)


def click(rng: np.random.Generator, colour: int) -> tuple[str, str]:
    """Return (query, item) of a click: mostly of the user's colour, never of the last thing."""
    thing = int(rng.choice(8, p=[0.3, 0.2, 0.15, 0.1, 0.1, 0.1, 0.05, 0.0]))
    shown = colour if rng.random() < 0.8 else int(rng.integers(NUM_COLOURS))
    return tiny_run.THINGS[thing], f"i{NUM_COLOURS * thing + shown}"


def examples(seed: int, count: int) -> pa.Table:
    """Clicks with histories; every fifth user has none."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        colour = number % NUM_COLOURS
        past = [click(rng, colour) for _ in range(0 if number % 5 == 0 else 3)]
        query, item = click(rng, colour)
        rows.append(
            {
                "user_id": f"u{number}", "timestamp": NOW, "query": query,
                "history_item_ids": [item for _, item in past],
                "history_queries": [query for query, _ in past],
                "history_timestamps": [NOW - timedelta(days=9 - n) for n in range(len(past))],
                "positive_item_id": item,
            }
        )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


def write_data(root: Path, num_valid: int = 300) -> str:
    """DATA with items, training windows and both splits; returns DATA."""
    data, rng = str(root / "data"), np.random.default_rng(0)
    items = tiny_run.items_table().drop_columns(["brand", "category"])
    colours = [tiny_run.COLOURS[n % NUM_COLOURS] for n in range(40)]
    brands = [None if n % 7 == 0 else f"{colour} & sons" for n, colour in enumerate(colours)]
    things = [tiny_run.THINGS[n // NUM_COLOURS] for n in range(40)]
    items = items.append_column("brand", pa.array(brands, pa.string()))
    items = items.append_column("category", pa.array(things, pa.string()))
    write_table(items, join(data, "items"))
    windows = [
        {"user_id": f"t{n}", "item_ids": [click(rng, n % NUM_COLOURS)[1] for _ in range(6)],
         "loss_mask": [True] * 6}
        for n in range(100)
    ]  # fmt: skip
    write_table(pa.Table.from_pylist(windows, schema=SEQUENCES), join(data, "sequences"))
    for split, seed, count in (("valid", 1, num_valid), ("test", 2, 60)):
        write_table(examples(seed, count), join(data, "examples", f"split={split}"))
    write_json({"prepare": {}}, join(data, "prepared.json"))
    return data


def write_run(root: Path) -> str:
    """A finished run with channels beside its data; returns RUN."""
    write_data(root)
    run = tiny_run.write_run(root)
    folder = RunFolder(run).item_embeddings
    things = [tiny_run.THINGS[n // NUM_COLOURS] for n in range(40)]
    save_embeddings(replace(load_embeddings(folder), categories=things), folder)
    index_run(run)
    return run

"""The toy shop's truth, for its ceilings only: tastes, click rules and personas over time.

Legend: Z personas, I items of the catalogue, M items of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from karma_ray.artifacts import join, read_json, read_table
from karma_ray.data.synthetic.config import START, ToyShopConfig

MICROSECONDS_PER_DAY = 86_400_000_000


@dataclass(frozen=True)
class ToyTruth:
    """The generator's parameters in catalogue order; times are microseconds since 1970."""

    config: ToyShopConfig
    weights: np.ndarray  # [Z, I]: taste factors on the odds of a click
    promoted: np.ndarray  # [I] bool
    on_sale_from: np.ndarray  # [I] int64
    matches: dict[str, np.ndarray]  # query -> rows [M]

    @classmethod
    def load(cls, data_uri: str, item_ids: Sequence[str]) -> ToyTruth:
        """Read DATA/truth; `item_ids` are the rows of the catalogue."""
        facts = read_json(join(data_uri, "truth", "config.json"))
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()
        }
        config = ToyShopConfig(**values)
        launch = _in_order(read_table(join(data_uri, "truth", "items")), item_ids)
        rows = {item_id: row for row, item_id in enumerate(item_ids)}
        matches = read_table(join(data_uri, "query_matches")).to_pydict()
        return cls(
            config=config,
            weights=_weights(data_uri, item_ids, config.num_personas),
            promoted=launch.column("promoted").to_numpy(),
            on_sale_from=launch.column("on_sale_from").cast(pa.int64()).to_numpy(),
            matches={
                query: np.array([rows[item] for item in items if item in rows], dtype=np.int64)
                for query, items in zip(matches["query"], matches["item_ids"], strict=True)
            },
        )

    @property
    def valid_start(self) -> int:
        """The time when the promotion code loses its effect."""
        return int(START.astype(np.int64)) + self.config.valid_day * MICROSECONDS_PER_DAY

    def day(self, time: int) -> int:
        """Return the day number of a time; personas change at midnight."""
        return (time - int(START.astype(np.int64))) // MICROSECONDS_PER_DAY


@dataclass(frozen=True)
class PersonaStates:
    """The true persona of each user at each page."""

    times: dict[str, np.ndarray]  # user -> [pages] int64, rising
    personas: dict[str, np.ndarray]  # user -> [pages] int64

    @classmethod
    def load(cls, data_uri: str) -> PersonaStates:
        """Read DATA/truth/states."""
        table = read_table(join(data_uri, "truth", "states"))
        users = np.array(table.column("user_id").to_pylist())
        times = table.column("timestamp").cast(pa.int64()).to_numpy()
        personas = table.column("persona").to_numpy()
        order = np.lexsort((times, users))
        names, starts = np.unique(users[order], return_index=True)
        parts = np.split(order, starts[1:])
        named = dict(zip(names.tolist(), parts, strict=True))
        return cls(
            {name: times[part] for name, part in named.items()},
            {name: personas[part] for name, part in named.items()},
        )

    def at(self, user_id: str, time: int) -> int | None:
        """Return the persona of the user's latest page up to `time`; None for unknown users."""
        times = self.times.get(user_id)
        if times is None:
            return None
        place = max(int(np.searchsorted(times, time, side="right")) - 1, 0)
        return int(self.personas[user_id][place])


def _in_order(table: pa.Table, item_ids: Sequence[str]) -> pa.Table:
    """Return the rows of `table` in the order of `item_ids`."""
    rows = {item_id: row for row, item_id in enumerate(table.column("item_id").to_pylist())}
    return table.take([rows[item_id] for item_id in item_ids])


def _weights(data_uri: str, item_ids: Sequence[str], num_personas: int) -> np.ndarray:
    """Return the product of the taste factors of each item's attribute values, [Z, I]."""
    tastes = read_table(join(data_uri, "truth", "tastes")).to_pylist()
    factors: dict[tuple[str, str, str], np.ndarray] = {}
    for row in tastes:
        key = (row["department"], row["attribute"], row["value"])
        factors.setdefault(key, np.ones(num_personas))[row["persona"]] = row["factor"]
    attributes = sorted({attribute for _, attribute, _ in factors})
    columns = ["item_id", "attr_department", *(f"attr_{name}" for name in attributes)]
    items = _in_order(read_table(join(data_uri, "items"), columns=columns), item_ids).to_pydict()
    weights = np.ones((num_personas, len(item_ids)))
    for name in attributes:
        pairs = zip(items["attr_department"], items[f"attr_{name}"], strict=True)
        weights *= np.stack([factors[place, name, value] for place, value in pairs], axis=1)
    return weights

"""The clicks that the funnel is measured on, and what counts as found for each.

Legend: n clicks of a split, m judged (click, item) pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from karma_ray.data.catalog import Catalog
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError
from karma_ray.evaluation.impressions import sampled
from karma_ray.evaluation.measurement import MAX_SCORES

Rows = NDArray[np.int64]
BLOCK = 256
"""Requests that are scored at once; fewer where the catalogue is very large."""


@dataclass(frozen=True)
class Clicks:
    """Clicks of `valid` or `test`; each is one request with its target."""

    split: str
    examples: pa.Table
    """[n]"""
    targets: Rows
    """[n] catalogue rows; -1 for a target that left the catalogue."""
    scene: Rows
    """[m] the click of each pair of `scene_items`, ascending."""
    scene_items: Rows
    """[m] catalogue rows of everything that the click's user clicked after the click's query."""
    num_items: int

    @classmethod
    def read(
        cls, source: PreparedData, catalog: Catalog, split: str, limit: int, seed: int = 0
    ) -> Clicks:
        """Read a split, or a seeded sample of `limit` clicks; raises InputError if it is empty."""
        table = source.examples(split)
        if table.num_rows == 0:
            raise InputError("--data", source.uri, f"has no clicks to measure in its split {split}")
        examples = sampled(table, limit, seed) if table.num_rows > limit else table
        targets = catalog.rows(examples.column("positive_item_id").combine_chunks())
        scene, items = _all_scene(table, examples, targets, catalog)
        return cls(split, examples, targets, scene, items, catalog.num_items)

    @property
    def users(self) -> list[str]:
        """[n] the user of every click."""
        return [str(user) for user in self.examples.column("user_id").to_pylist()]

    def blocks(self) -> Iterator[slice]:
        """Yield the clicks that are scored at once."""
        size = max(1, min(BLOCK, MAX_SCORES // self.num_items))
        for start in range(0, len(self.targets), size):
            yield slice(start, min(start + size, len(self.targets)))

    def scene_of(self, block: slice) -> slice:
        """Return the pairs of a block's clicks."""
        first, last = np.searchsorted(self.scene, [block.start, block.stop])
        return slice(int(first), int(last))


def _all_scene(
    table: pa.Table, examples: pa.Table, targets: Rows, catalog: Catalog
) -> tuple[Rows, Rows]:
    """Pair every click with all clicks of its user after its query, of the whole split.

    ASH counts actions of the same user and query from other scenes too. Without a query there is
    nothing that other pages share with this one, and the click stands alone.
    """
    clicked: dict[tuple[str, str], dict[int, None]] = {}
    rows = catalog.rows(table.column("positive_item_id").combine_chunks())
    for user, query, row in zip(*_users_and_queries(table), rows.tolist(), strict=True):
        if query and row >= 0:
            clicked.setdefault((user, query), {})[row] = None
    scene: list[int] = []
    items: list[int] = []
    keys = zip(*_users_and_queries(examples), targets.tolist(), strict=True)
    for number, (user, query, target) in enumerate(keys):
        found = list(clicked.get((user, query), {})) or [target]
        scene += [number] * len(found)
        items += found
    return np.array(scene, np.int64), np.array(items, np.int64)


def _users_and_queries(table: pa.Table) -> tuple[list[str], list[str]]:
    return table.column("user_id").to_pylist(), table.column("query").to_pylist()

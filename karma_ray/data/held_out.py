"""Categories that are held out of training, to measure what a ranker knows without their clicks.

The unit is the last part of a category path `a > b > c`, in lower case: the most specific name. So
the dresses of all departments are one category, and are held out together.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from karma_ray.errors import InputError

_LISTS = ("exposed", "clicked", "purchased")


def leaf(category: str | None) -> str:
    """Return the last part of a category path in lower case, or "" without a category."""
    return (category or "").rpartition(" > ")[2].strip().lower()


def held_out_categories(categories: Sequence[str | None], share: float, seed: int) -> set[str]:
    """Return the held-out ones among the `leaf` names of `categories`: `share` of them, at least 1.

    They have the lowest hashes of seed and name, so the choice depends on neither the order of
    the items nor their number. Raises InputError if not a single category would remain.
    """
    if share == 0:
        return set()
    names = sorted({name for name in map(leaf, set(categories)) if name})
    count = max(1, round(share * len(names)))
    if count >= len(names):
        problem = f"leaves no category for training; the items have {len(names)}"
        raise InputError("prepare.hold_out", share, problem)
    return set(
        sorted(names, key=lambda name: (zlib.crc32(f"{seed}:{name}".encode()), name))[:count]
    )


def held_out_rows(categories: Sequence[str | None], chosen: set[str]) -> NDArray[np.bool_]:
    """Return the mask [items] of items in `chosen` categories; items without one never are."""
    return np.array([leaf(category) in chosen for category in categories], dtype=bool)


def without_items(pages: pl.DataFrame, item_ids: pa.Array) -> pl.DataFrame:
    """Remove items from the lists of all pages, and then the pages without a click."""
    gone = pl.Series(item_ids).implode()
    kept = pl.element().filter(~pl.element().is_in(gone))
    pages = pages.with_columns(pl.col(name).list.eval(kept) for name in _LISTS)
    return pages.filter(pl.col("clicked").list.len() > 0)

"""Hard negatives of a page: items that were shown, but neither clicked nor bought."""

from __future__ import annotations

import zlib

import numpy as np
import polars as pl
import pyarrow as pa


def page_negatives(pages: pl.DataFrame, scope: str, cap: int | None, seed: int) -> pa.ListArray:
    """Return, per page [P], the exposed items without a click or purchase within `scope`.

    If there are more than `cap`, the items with the lowest seeded hashes are kept, in page order.
    """
    place = pages.select(pl.int_range(pl.len()).alias("place"), pl.all())
    shown = place.select("place", scope, item="exposed").explode("item").drop_nulls("item")
    liked = pl.concat(
        [place.select(scope, item=name).explode("item") for name in ("clicked", "purchased")]
    )
    negatives = (
        shown.with_row_index("shown")
        .join(liked, on=[scope, "item"], how="anti", nulls_equal=False)
        .sort("shown")
    )
    if cap is not None:
        too_many = pl.len().over("place") > cap
        chosen = negatives.filter(too_many)  # hashes cost time, and are needed on these pages only
        chosen = chosen.with_columns(pl.Series("hash", _hash(chosen, place["page_id"], seed)))
        rank = pl.int_range(pl.len()).over("place", order_by=["hash", "shown"])
        chosen = chosen.filter(rank < cap).drop("hash")
        negatives = pl.concat([negatives.filter(~too_many), chosen]).sort("shown")
    counts = np.bincount(negatives["place"].to_numpy(), minlength=pages.height)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    values = negatives["item"].to_arrow().cast(pa.string())
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _hash(negatives: pl.DataFrame, page_ids: pl.Series, seed: int) -> np.ndarray:
    """Return a 64-bit hash [n] of (page, item, seed) that does not depend on library versions."""
    items = negatives["item"].to_arrow().cast(pa.string()).dictionary_encode()
    item = _crc(items.dictionary.to_pylist())[items.indices.to_numpy(zero_copy_only=False)]
    places, of_negative = np.unique(negatives["place"].to_numpy(), return_inverse=True)
    page = _crc(page_ids.gather(places).to_list())[of_negative]
    salt = np.uint64((seed * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
    with np.errstate(over="ignore"):
        return _mix(item ^ _mix(page + salt))


def _crc(values: list[str]) -> np.ndarray:
    return np.array([zlib.crc32(value.encode()) for value in values], dtype=np.uint64)


def _mix(value: np.ndarray) -> np.ndarray:
    # splitmix64's finaliser
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))

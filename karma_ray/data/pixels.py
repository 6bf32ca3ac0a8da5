"""The catalogue's pictures as small squares, decoded once per node and memory-mapped.

They are the input of multimodal item encoders; frozen visual features are in data/visual.py.

Legend: I items, n rows, S pixels of a side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from karma_ray.data.catalog import Catalog
from karma_ray.data.fragments import items_folder, list_fragments
from karma_ray.data.memory_map import mapped_array
from karma_ray.data.picture_files import BrokenImage
from karma_ray.data.pictures import UNUSED, decode, read_images, source_rows

NO_PICTURE = -1
"""Catalogue row of a text without a picture, such as a query."""
FORMAT = 1
"""Raised when the code computes other pixels from the same image, so that old files are ignored."""


@dataclass(frozen=True)
class PixelTable:
    """Pictures by catalogue row; an item without a readable picture has none."""

    values: np.ndarray  # [I, 1 + S * S * 3] uint8: 1 where there is a picture, then its pixels

    @property
    def side(self) -> int:
        """Pixels per side, S."""
        return math.isqrt((self.values.shape[1] - 1) // 3)

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return, for catalogue rows [n] int64, the mask [n] of those with a picture, and their
        pixels [pictures, S, S, 3] uint8. Row NO_PICTURE has none."""
        pictured = (rows >= 0) & self.values[rows, 0].astype(bool)
        found = self.values[rows[pictured], 1:]
        return pictured, found.reshape(-1, self.side, self.side, 3)


def catalog_pixels(catalog: Catalog, data_uri: str, side: int) -> PixelTable:
    """Load the pictures of the data folder that `catalog` was loaded from.

    Raises InputError when its items have no column `image`. Unreadable pictures count as absent.
    """
    if catalog.copy is None:
        values = np.zeros(_shape(catalog, side), np.uint8)
        _fill(values, catalog, data_uri, side)
        return PixelTable(values)
    path = catalog.copy.with_name(f"{catalog.copy.stem}-{side}-{FORMAT}.pixels.npy")
    return PixelTable(
        mapped_array(
            path, np.uint8, _shape(catalog, side),
            lambda values: _fill(values, catalog, data_uri, side),
        )
    )  # fmt: skip


def _shape(catalog: Catalog, side: int) -> tuple[int, int]:
    return catalog.num_items, 1 + side * side * 3


def _fill(values: np.ndarray, catalog: Catalog, data_uri: str, side: int) -> None:
    items = items_folder(data_uri)
    kinds = source_rows(items, None)
    for fragment in list_fragments(items)[0]:
        usable = kinds[fragment.order : fragment.order + fragment.num_rows] != UNUSED
        for rows in read_images(fragment, items, usable):
            used = [row for row in rows if row[2] and usable[row[0]]]
            places = catalog.rows([item_id for _, item_id, _ in used])
            for place, (_, _, data) in zip(places, used, strict=True):
                try:
                    values[place, 1:] = decode(data or b"", side).reshape(-1)
                except BrokenImage:
                    continue
                values[place, 0] = 1

"""Small pictures of items, read from the data folder when somebody looks at them."""

from __future__ import annotations

import base64
import io
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
from PIL import Image

from karma_ray.data.fragments import Fragment, list_fragments, read_fragment
from karma_ray.data.picture_files import BrokenImage
from karma_ray.data.pictures import decode, read_images

SIDE = 96
"""Pixels per side."""
MAX_STORED = 5000
"""Pictures that are stored, a few kilobytes each; who was not looked at for longest goes."""


class Thumbnails:
    """Pictures of the items of a folder items/, as `data:` addresses of JPEGs. For one thread."""

    def __init__(self, folder: str) -> None:
        """`folder` holds Parquet files with the columns `item_id` and `image`."""
        self._folder = folder
        self._stored: OrderedDict[str, str | None] = OrderedDict()

    def of(self, item_ids: Sequence[str]) -> dict[str, str]:
        """Return the pictures of those items that have a readable one."""
        wanted: dict[int, dict[int, str]] = {}
        for item_id in item_ids:
            if item_id in self._stored:
                self._stored.move_to_end(item_id)
            elif item_id in self._places:
                part, row = self._places[item_id]
                wanted.setdefault(part, {})[row] = item_id
        for part, rows in wanted.items():
            self._stored.update(self._read(self._parts[part], rows))
        found = {item_id: self._stored.get(item_id) for item_id in item_ids}
        while len(self._stored) > MAX_STORED:
            self._stored.popitem(last=False)
        return {item_id: picture for item_id, picture in found.items() if picture}

    @cached_property
    def _parts(self) -> list[Fragment]:
        return list_fragments(self._folder)[0]

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Row group and row of every item; of repeated ids the first, as in the catalogue."""
        places: dict[str, tuple[int, int]] = {}
        for number, part in enumerate(self._parts):
            table = read_fragment(self._folder, part.path, part.row_group, ["item_id"])
            for row, item_id in enumerate(table.column("item_id").cast(pa.string()).to_pylist()):
                places.setdefault(item_id, (number, row))
        return places

    def _read(self, part: Fragment, wanted: dict[int, str]) -> dict[str, str | None]:
        """Read a row group as far as it is needed."""
        found: dict[str, str | None] = {}
        mask = np.isin(np.arange(part.num_rows), list(wanted))
        for rows in read_images(part, self._folder, mask):
            for row, _, data in rows:
                if row in wanted:
                    found[wanted[row]] = _address(data)
            if len(found) == len(wanted):
                break
        return found


def _address(data: bytes | BrokenImage | None) -> str | None:
    if not data:
        return None
    try:
        pixels = decode(data, SIDE)
    except BrokenImage:
        return None
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()

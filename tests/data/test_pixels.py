"""Pictures by catalogue row: decoded once per node, absent where there is none to read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from karma_ray.artifacts import join, write_table
from karma_ray.data import pixels
from karma_ray.data.catalog import Catalog
from karma_ray.data.pictures import decode
from karma_ray.data.pixels import catalog_pixels
from karma_ray.data.schema import ITEMS
from karma_ray.errors import InputError
from tests.data.test_pictures import ROWS


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Items in two files: some without an image, some broken, one id twice."""
    table = pa.Table.from_pylist(ROWS, schema=ITEMS)
    write_table(table.slice(0, 4), join(str(tmp_path), "items"), "part-0")
    write_table(table.slice(4), join(str(tmp_path), "items"), "part-1")
    return str(tmp_path)


@pytest.mark.parametrize("mapped", [True, False], ids=["node's copy", "in memory"])
def test_pictures_are_found_by_row(data: str, mapped: bool) -> None:
    catalog = Catalog.load(data, join(data, "cache"))
    catalog = catalog if mapped else Catalog(catalog.table)
    table = catalog_pixels(catalog, data, 5)
    assert table.side == 5
    pictured, found = table.gather(catalog.rows(["green", "cut", "gone", "bare", "red", "text"]))
    assert pictured.tolist() == [True, False, False, False, True, False]
    assert (found.shape, found.dtype) == ((2, 5, 5, 3), np.uint8)
    np.testing.assert_array_equal(found[0], decode(ROWS[8]["image"], 5))
    np.testing.assert_array_equal(found[1], decode(ROWS[0]["image"], 5))  # not the second red


def test_processes_of_a_node_decode_once(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog.load(data, join(data, "cache"))
    first = catalog_pixels(catalog, data, 4)
    monkeypatch.setattr(pixels, "_fill", None)
    again = catalog_pixels(catalog, data, 4)
    np.testing.assert_array_equal(first.values, again.values)
    assert not again.values.flags.writeable and not again.values.flags.owndata


def test_a_catalogue_without_images_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS, schema=ITEMS).drop_columns(["image"])
    write_table(table, join(str(tmp_path), "items"))
    catalog = Catalog.load(str(tmp_path), str(tmp_path / "cache"))
    with pytest.raises(InputError, match="no column `image`"):
        catalog_pixels(catalog, str(tmp_path), 4)
    assert not list((tmp_path / "cache").glob("*.tmp"))

"""Pictures that the items table names instead of holding them, on disk and in a store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from karma_ray.artifacts import join, read_lines, read_table, write_bytes, write_table
from karma_ray.data import picture_files
from karma_ray.data.catalog import Catalog
from karma_ray.data.fragments import list_fragments
from karma_ray.data.importers.long import import_long
from karma_ray.data.picture_files import BrokenImage, fetch
from karma_ray.data.pictures import read_images
from karma_ray.data.pixels import catalog_pixels
from karma_ray.runs.features import FeaturesConfig, make_features
from tests.cluster.stores import BUCKET, running_store
from tests.data.test_pictures import coded

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "grey": (90, 90, 90)}
CONFIG = FeaturesConfig(target="pooled:1", width=2)


@pytest.fixture(params=["disk", "store"])
def root(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A folder on disk or in a store."""
    if request.param == "disk":
        yield str(tmp_path / "data")
        return
    with running_store(monkeypatch):
        yield f"s3://{BUCKET}/data"


def write_items(folder: str, images: pa.Array) -> None:
    ids = pa.array([f"i{n}" for n in range(len(images))])
    write_table(pa.table({"item_id": ids, "title": ids, "image": images}), join(folder, "items"))


def test_named_pictures_give_the_features_of_their_bytes(root: str, tmp_path: Path) -> None:
    for name, colour in COLOURS.items():
        write_bytes(coded(colour), join(root, "pictures", f"{name}.png"))
    write_bytes(b"<html>404</html>", join(root, "pictures", "page.png"))
    elsewhere = tmp_path / "elsewhere" / "a [1] *.png"
    write_bytes(coded((9, 99, 199)), str(elsewhere))
    names = [f"pictures/{name}.png" for name in COLOURS]
    names[1] = join(root, names[1])  # in full
    names += [str(elsewhere), "pictures/page.png", "pictures/gone.png", "nowhere://x", "", None]
    write_items(root, pa.array(names, pa.large_string()))
    facts = make_features(root, CONFIG)
    counts = ("num_items", "with_image", "without_image", "broken_image")
    assert [facts[name] for name in counts] == [10, 5, 2, 3]
    reasons = {
        record["item_id"]: record["reason"]
        for record in read_lines(join(root, "visual_features", "quarantine.jsonl"))
    }
    assert reasons["i5"] == "in no known format"
    assert reasons["i6"].startswith(f"{root}/pictures/gone.png: FileNotFoundError")
    assert "nowhere" in reasons["i7"]

    pictures = [*(coded(colour) for colour in COLOURS.values()), coded((9, 99, 199))]
    whole = str(tmp_path / "bytes")
    write_items(whole, pa.array([*pictures, *[None] * 5], pa.binary()))
    make_features(whole, CONFIG)
    tables = [read_table(join(data, "visual_features")) for data in (root, whole)]
    assert tables[0].equals(tables[1])
    pixels = [
        catalog_pixels(Catalog.load(data, str(tmp_path / "cache")), data, 4).values
        for data in (root, whole)
    ]
    np.testing.assert_array_equal(*pixels)


def test_only_wanted_pictures_are_fetched(tmp_path: Path) -> None:
    data = str(tmp_path)
    write_bytes(coded((1, 2, 3)), join(data, "a.png"))
    write_items(data, pa.array(["a.png", "gone.png", "a.png"]).dictionary_encode())
    items = join(data, "items")
    (fragment,) = list_fragments(items)[0]
    (rows,) = read_images(fragment, items, np.array([True, False, False]))
    assert [row[2] for row in rows] == [coded((1, 2, 3)), None, None]
    (rows,) = read_images(fragment, items)
    assert isinstance(rows[1][2], BrokenImage) and rows[0][2] == rows[2][2]


def test_a_file_that_is_too_large_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_files, "MAX_BYTES", 10)
    (tmp_path / "small").write_bytes(bytes(10))
    (tmp_path / "large").write_bytes(bytes(11))
    small, large = fetch(["small", "large"], str(tmp_path))
    assert small == bytes(10)
    assert isinstance(large, BrokenImage) and "has more than" in str(large)


def test_an_import_keeps_names_and_says_where_they_start(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(
        "item_id,title,image\n1,a,pictures/1.png\n2,b,s3://bucket/2.png\n3,c,\n4,d,/data/4.png\n"
    )
    (tmp_path / "log.csv").write_text("user_id,timestamp,item_id\nu,1,1\nu,2,2\n")
    out = str(tmp_path / "out")
    manifest = import_long(str(tmp_path / "log.csv"), out, items=str(tmp_path / "items.csv"))
    assert manifest["counts"]["with_image"] == 3
    images = read_table(join(out, "items"))["image"].to_pylist()
    assert images == [f"{tmp_path}/pictures/1.png", "s3://bucket/2.png", None, "/data/4.png"]
    folder = tmp_path / "folder"
    folder.mkdir()
    pl.DataFrame({"item_id": ["1"], "title": ["a"], "image": ["1.png"]}).write_parquet(
        folder / "items.parquet"
    )
    import_long(str(tmp_path / "log.csv"), out, items=str(folder))
    assert read_table(join(out, "items"))["image"].to_pylist() == [f"{folder}/1.png"]

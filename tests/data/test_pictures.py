"""Images of any kind become square pixels; broken ones are set aside and stop nothing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from karma_ray.artifacts import join, read_table, write_table
from karma_ray.data import pictures
from karma_ray.data.fragments import list_fragments
from karma_ray.data.picture_files import BrokenImage
from karma_ray.data.pictures import (
    FITTED,
    UNUSED,
    USABLE,
    Part,
    decode,
    encode_fragment,
    part_name,
    sample_images,
    source_rows,
)
from karma_ray.data.schema import ITEMS
from karma_ray.data.work_folder import WorkFolder
from karma_ray.errors import InputError


def coded(colour: tuple[int, ...], kind: str = "PNG", mode: str = "RGB", size: int = 9) -> bytes:
    sink = io.BytesIO()
    Image.new(mode, (size, size), colour).save(sink, kind)
    return sink.getvalue()


class MeanColour:
    """An encoder of one token: the mean colour."""

    side = 4

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images.mean((1, 2), dtype=np.float64)[:, None, :].astype(np.float32)


ROWS = [
    {"item_id": "red", "title": "t", "image": coded((250, 0, 0))},
    {"item_id": "blue", "title": "t", "image": coded((0, 0, 250), "JPEG")},
    {"item_id": "nameless", "title": " ", "image": coded((1, 1, 1))},
    {"item_id": "bare", "title": "t"},
    {"item_id": "empty", "title": "t", "image": b""},
    {"item_id": "cut", "title": "t", "image": coded((0, 9, 0), size=64)[:60]},
    {"item_id": "text", "title": "t", "image": b"<html>404</html>"},
    {"item_id": "red", "title": "a second red", "image": coded((9, 9, 9))},
    {"item_id": "green", "title": "t", "image": coded((0, 250, 0), "WEBP")},
]


@pytest.fixture
def items(tmp_path: Path) -> str:
    """items/ of two files."""
    table = pa.Table.from_pylist(ROWS, schema=ITEMS)
    write_table(table.slice(0, 4), join(str(tmp_path), "items"), "part-0")
    write_table(table.slice(4), join(str(tmp_path), "items"), "part-1")
    return join(str(tmp_path), "items")


@pytest.mark.parametrize(
    ("data", "pixel"),
    [
        (coded((250, 10, 30)), [250, 10, 30]),
        (coded((250, 10, 30), "GIF"), [250, 10, 30]),
        (coded((77,), mode="L"), [77, 77, 77]),
        (coded((9, 9, 9, 0), mode="RGBA"), [255, 255, 255]),
        (coded((0, 255, 255, 0), "JPEG", mode="CMYK", size=64), [255, 0, 0]),
    ],
    ids=["rgb", "palette", "grey", "transparent", "cmyk"],
)
def test_every_colour_mode_becomes_rgb(data: bytes, pixel: list[int]) -> None:
    found = decode(data, 5)
    assert found.shape == (5, 5, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - pixel).max() <= 2


def test_an_unreadable_image_and_a_bomb_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (b"", b"<html>", coded((0, 9, 0), size=64)[:60]):
        with pytest.raises(BrokenImage):
            decode(data, 4)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 80)
    with pytest.raises(BrokenImage, match="9 x 9 pixels are too many"):
        decode(coded((1, 2, 3)), 4)


def test_rows_follow_the_rules_of_the_catalogue(items: str) -> None:
    used = [FITTED, FITTED, UNUSED, FITTED, FITTED, FITTED, FITTED, UNUSED, FITTED]
    assert source_rows(items, None).tolist() == used
    kinds = source_rows(items, pa.array(["red", "nameless", "gone"])).tolist()
    assert kinds == [FITTED, *[USABLE if kind else UNUSED for kind in used[1:]]]


def test_items_without_an_image_column_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS, schema=ITEMS).drop_columns(["image"])
    write_table(table, join(str(tmp_path), "items"))
    with pytest.raises(InputError, match="no column `image`"):
        source_rows(join(str(tmp_path), "items"), None)


@pytest.mark.parametrize("read_rows", [2, 100])
def test_parts_hold_the_features_and_the_quarantine_the_rest(
    items: str, tmp_path: Path, read_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "READ_ROWS", read_rows)
    work, kinds = WorkFolder(str(tmp_path / "out")), source_rows(items, pa.array(["blue", "green"]))
    parts = []
    for fragment in list_fragments(items)[0]:
        assert work.finished_part(part_name(fragment)) is None
        mine = kinds[fragment.order : fragment.order + fragment.num_rows]
        parts.append(encode_fragment(fragment, items, mine, MeanColour(), work))
        found = Part(**work.finished_part(part_name(fragment)))
        assert found == parts[-1] == Part(**work.finished()[part_name(fragment)])
    table = read_table(work.table)
    assert table.column("item_id").to_pylist() == ["red", "blue", "green"]
    found = np.array(table.column("feature").to_pylist())
    np.testing.assert_allclose(found, 250 * np.eye(3)[[0, 2, 1]], atol=3)
    assert [part.with_image for part in parts] == [2, 1]
    assert [part.without_image for part in parts] == [1, 1]
    broken = [record for part in parts for record in part.broken]
    assert [(record["item_id"], record["row"]) for record in broken] == [("cut", 1), ("text", 2)]
    assert broken[1]["reason"] == "in no known format"
    sums = parts[0].moments + parts[1].moments
    assert sums.count == 2
    np.testing.assert_allclose(sums.total, [0, 250, 250], atol=4)  # red is not fitted on


def test_a_sample_is_of_readable_fitted_images_and_drawn_by_the_seed(items: str) -> None:
    kinds = source_rows(items, pa.array(["blue", "text", "green", "bare"]))
    sample = sample_images(items, kinds, side=4, count=100, seed=0)
    assert sample.shape == (2, 4, 4, 3)
    assert sorted(sample.reshape(2, -1, 3).mean(1).argmax(1).tolist()) == [1, 2]
    one = [sample_images(items, source_rows(items, None), 4, 1, seed) for seed in (0, 0, 1, 2, 3)]
    assert all(len(found) == 1 for found in one)
    assert (one[0] == one[1]).all() and any((one[0] != other).any() for other in one[2:])
    with pytest.raises(InputError, match="no readable image"):
        sample_images(items, source_rows(items, pa.array(["text"])), 4, 10, 0)

"""The catalogue keeps usable items, in order, and shares one Arrow copy per node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from karma_ray.artifacts import join, write_table
from karma_ray.data import catalog
from karma_ray.data.catalog import Catalog, usable_items
from karma_ray.data.schema import ITEMS
from karma_ray.errors import InputError
from tests import tiny


def _items(*rows: dict[str, object]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=ITEMS)


def _write(folder: Path, table: pa.Table) -> str:
    write_table(table, join(str(folder), "items"))
    return str(folder)


MESSY = _items(
    {"item_id": "a", "title": "red mug", "image": b"jpeg"},
    {"item_id": "b", "title": "  "},
    {"item_id": " ", "title": "nameless"},
    {"item_id": "a", "title": "the second a"},
    {"item_id": "c", "title": "blue mug", "brand": "B", "category": "K", "text": "T"},
)


def test_rows_without_id_or_title_and_repeated_ids_are_no_items() -> None:
    assert usable_items(MESSY).tolist() == [True, False, False, False, True]


def test_a_repeated_id_keeps_its_first_row_across_chunks() -> None:
    chunked = pa.concat_tables([MESSY.slice(0, 2), MESSY.slice(2, 1), MESSY.slice(3)])
    assert chunked.column("item_id").num_chunks == 3
    assert usable_items(chunked).tolist() == usable_items(MESSY).tolist()


def test_a_first_row_without_a_title_does_not_hide_a_later_good_one() -> None:
    table = _items({"item_id": "a", "title": ""}, {"item_id": "a", "title": "mug"})
    assert usable_items(table).tolist() == [False, True]


def test_a_loaded_catalogue_holds_the_usable_rows_in_order(tmp_path: Path) -> None:
    loaded = Catalog.load(_write(tmp_path / "d", MESSY), str(tmp_path / "cache"))
    assert loaded.item_ids == ["a", "c"]
    assert loaded.titles == ["red mug", "blue mug"]
    assert loaded.num_items == 2


def test_images_are_not_read_and_further_columns_ride_along(tmp_path: Path) -> None:
    table = MESSY.append_column("price", pa.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    loaded = Catalog.load(_write(tmp_path / "d", table), str(tmp_path / "cache"))
    assert loaded.column("image") is None
    assert loaded.column("price") == [1.0, 5.0]


def test_loading_twice_reads_one_arrow_copy_and_other_items_make_another(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = Catalog.load(_write(tmp_path / "one", MESSY), str(cache))
    again = Catalog.load(str(tmp_path / "one"), str(cache))
    assert first.table.equals(again.table)
    assert len(list(cache.glob("*.arrow"))) == 1
    Catalog.load(_write(tmp_path / "two", MESSY.slice(4)), str(cache))
    assert len(list(cache.glob("*.arrow"))) == 2


def test_the_copy_of_a_node_is_private_to_its_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = _write(tmp_path / "d", MESSY)
    Catalog.load(data)
    (folder,) = tmp_path.glob("karma_ray-node-*")
    assert folder.stat().st_mode & 0o077 == 0
    elsewhere = tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    with pytest.raises(InputError, match="is not private"):
        Catalog.load(data)


def test_an_empty_catalogue_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        Catalog(_items().drop_columns(["image"]))


def test_rows_of_unknown_ids_are_minus_one() -> None:
    assert tiny.catalog().rows(["i3", "never seen", "i0"]).tolist() == [3, -1, 0]
    assert tiny.catalog().rows([]).dtype == np.int64


def test_texts_join_the_parts_that_exist() -> None:
    table = MESSY.filter(pa.array(usable_items(MESSY)))
    assert Catalog(table).texts() == ["red mug", "blue mug | B | K | T"]


def test_content_ids_are_equal_for_equal_text_but_for_case_and_spaces() -> None:
    content = tiny.catalog().content_ids
    (copy,) = tiny.catalog().rows(["copy"])
    assert content[copy] == content[0]
    assert len(set(content.tolist())) == tiny.catalog().num_items - 1


def test_content_ids_number_the_texts_by_first_appearance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "CHUNK", 7)
    seen: dict[str, int] = {}
    texts = [" ".join(text.lower().split()) for text in tiny.catalog().texts()]
    expected = [seen.setdefault(text, len(seen)) for text in texts]
    assert tiny.catalog().content_ids.tolist() == expected


def test_the_processes_of_a_node_share_the_content_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = _write(tmp_path / "d", tiny.catalog().table), str(tmp_path / "cache")
    first = Catalog.load(data, cache).content_ids
    monkeypatch.setattr(catalog, "fill_content_ids", None)
    again = Catalog.load(data, cache).content_ids
    np.testing.assert_array_equal(again, first)
    assert not again.flags.writeable and not again.flags.owndata


def test_files_of_different_id_types_are_one_catalogue_and_folders_name_columns(
    tmp_path: Path,
) -> None:
    items = tmp_path / "data" / "items"
    for number, ids in enumerate(([7, 1234567890123456789], [8.0, float("nan")], ["9", "x"])):
        table = pa.table({"item_id": ids, "title": ["a", "b"]})
        write_table(table, str(items / f"category=shoes {number}"), "part")
    loaded = Catalog.load(str(tmp_path / "data"), str(tmp_path / "cache"))
    assert loaded.item_ids == ["7", "1234567890123456789", "8", "9", "x"]
    assert loaded.column("category")[-1] == "shoes 2"


def test_a_catalogue_has_categories_if_any_item_has_one() -> None:
    some = Catalog(MESSY.take([0, 4]))
    assert some.has_categories and some.categories == [None, "K"]
    empty = MESSY.set_column(4, "category", pa.array(["", None, "", "", None]))
    for table in (empty, MESSY.drop_columns(["category"]), MESSY.slice(0, 1)):
        assert not Catalog(table).has_categories and Catalog(table).categories is None

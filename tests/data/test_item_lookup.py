"""The lookup finds what a dictionary finds, is made once per node and survives equal hashes."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pytest

from karma_ray.artifacts import join, write_table
from karma_ray.data import item_lookup
from karma_ray.data.catalog import Catalog
from karma_ray.data.item_lookup import ItemLookup, text_hashes
from tests import tiny

IDS = ["", "a", "ab", "12345678", "123456789", "é", "日本", "x" * 40, "x" * 41, "0", "00", "a\0"]
IDS += [f"item-{number}" for number in range(300)]
ASKED = [*IDS[::-1], "never", "a ", "x" * 39, "item-300", "12345678\0", *IDS[:5]]
PINNED = {"item-7": 16462116157151269245, "日本": 5915910768036210651}


def _expected(asked: list[str]) -> list[int]:
    known = {item_id: row for row, item_id in enumerate(IDS)}
    return [known.get(item_id, -1) for item_id in asked]


def _column(size: int, kind: pa.DataType) -> pa.ChunkedArray:
    parts = [IDS[start : start + size] for start in range(0, len(IDS), size)]
    return pa.chunked_array([pa.array(part, kind) for part in parts])


@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize("asked_kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("size", [7, 1000])
def test_rows_are_those_of_a_dictionary(
    size: int, kind: pa.DataType, asked_kind: pa.DataType, few: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(item_lookup, "FEW", few)
    monkeypatch.setattr(item_lookup, "CHUNK", 50)
    lookup = ItemLookup(_column(size, kind))
    assert lookup.rows(pa.array(ASKED, asked_kind)).tolist() == _expected(ASKED)
    assert lookup.rows(pa.array(ASKED, asked_kind)[3:60]).tolist() == _expected(ASKED[3:60])
    assert lookup.rows(pa.array([], asked_kind)).tolist() == []
    assert lookup.rows(pa.array([None, "a", None], asked_kind)).tolist() == [-1, 1, -1]


@pytest.mark.parametrize("num_hashes", [1, 3])
def test_ids_with_equal_hashes_are_told_apart(
    num_hashes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def colliding(texts: pa.Array) -> np.ndarray:
        largest = np.uint64(2**64 - 1)
        return largest - text_hashes(texts) % np.uint64(num_hashes)

    monkeypatch.setattr(item_lookup, "FEW", 0)
    monkeypatch.setattr(item_lookup, "text_hashes", colliding)
    found = ItemLookup(_column(1000, pa.string())).rows(pa.array(ASKED))
    assert found.tolist() == _expected(ASKED)


def test_hashes_are_distinct_and_the_same_everywhere() -> None:
    hashes = text_hashes(pa.array(IDS))
    assert len(np.unique(hashes)) == len(IDS)
    np.testing.assert_array_equal(text_hashes(pa.array(IDS)[9:]), hashes[9:])
    assert hashes[[0, 3, 7]].tolist() == text_hashes(pa.array([IDS[i] for i in (0, 3, 7)])).tolist()
    # Files of other processes and machines hold these numbers.
    assert text_hashes(pa.array([*PINNED])).tolist() == [*PINNED.values()]


def test_processes_that_start_together_make_one_table_and_hold_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(tiny.catalog().table, join(str(tmp_path / "data"), "items"))
    expected = tiny.catalog().rows(["i3", "never", "copy"]).tolist()
    made: list[int] = []

    def counted(texts: pa.Array) -> np.ndarray:
        made.append(len(texts))
        return text_hashes(texts)

    monkeypatch.setattr(item_lookup, "FEW", 0)
    monkeypatch.setattr(item_lookup, "text_hashes", counted)
    found: list[np.ndarray] = []

    def look() -> None:
        catalog = Catalog.load(str(tmp_path / "data"), str(tmp_path / "cache"))
        found.append(catalog.rows(["i3", "never", "copy"]))
        lookup = catalog._lookup
        assert not lookup._hashes.flags.owndata and not lookup._hashes.flags.writeable

    threads = [Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [rows.tolist() for rows in found] == [expected] * 4
    assert sorted(made, reverse=True) == [tiny.catalog().num_items, 3, 3, 3, 3]
    assert len(list((tmp_path / "cache").glob("*.lookup.npy"))) == 1

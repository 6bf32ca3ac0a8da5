"""Vectors are found again by what was encoded, and by nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from karma_ray.data.pixels import PixelTable
from karma_ray.retrieval.encode import ItemTable, save_embeddings
from karma_ray.retrieval.known_vectors import (
    COLUMN,
    KnownVectors,
    content_hashes,
    has_hashes,
    hash_column,
    hashes_of,
)


def test_hashes_tell_texts_and_pictures_apart() -> None:
    values = np.zeros((3, 1 + 12), np.uint8)
    values[1:, 0], values[2, 5] = 1, 7
    texts = ["mug", "mug", "mug"]
    assert len(set(content_hashes(texts).tolist())) == 1
    assert len(set(content_hashes(texts, PixelTable(values)).tolist())) == 3
    later = content_hashes(texts[1:], PixelTable(values), first_row=1)
    assert later.tolist() == content_hashes(texts, PixelTable(values))[1:].tolist()
    assert len(set(content_hashes(["a", "b", "ab", ""]).tolist())) == 4


def test_a_column_gives_its_hashes_back_whatever_its_chunks() -> None:
    hashes = content_hashes([str(n) for n in range(9)])
    column = pa.chunked_array([hash_column(hashes[:4]), hash_column(hashes[4:])])
    table = pa.table({COLUMN: column}).slice(2, 5)
    found = hashes_of(table)
    assert found is not None and found.tolist() == hashes[2:7].tolist()
    assert hashes_of(pa.table({"n": [1]})) is None


def test_known_vectors_are_found_by_hash_and_others_are_not(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    hashes = content_hashes([f"text {n}" for n in range(5)])
    names = [str(n) for n in range(5)]
    for contents in (None, hashes):
        save_embeddings(ItemTable(names, names, vectors, {}, None, contents), str(tmp_path))
        assert has_hashes(str(tmp_path)) is (contents is not None)
    asked = content_hashes(["text 4", "other", "text 0"])
    known, found = KnownVectors(str(tmp_path)).find(asked)
    assert known.tolist() == [True, False, True] and np.array_equal(found, vectors[[4, 0]])

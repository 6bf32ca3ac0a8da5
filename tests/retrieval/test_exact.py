"""Exact search agrees with faiss, to the bytes of its file, and does not need it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from karma_ray.errors import InputError
from karma_ray.retrieval import exact
from karma_ray.retrieval.exact import ExactSearch
from karma_ray.retrieval.index import ItemIndex
from karma_ray.retrieval.kinds import InvertedLists
from tests.retrieval.test_index import build, vectors

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_FAISS = """
import sys
sys.modules["faiss"] = None
import pytest
from karma_ray.errors import InputError
from karma_ray.retrieval.index import ItemIndex
from karma_ray.retrieval.kinds import InvertedLists
from tests.retrieval.test_index import build, vectors
root = sys.argv[1]
build(vectors(50)).save(root + "/made")
for name in ("made", "flat"):
    rows, _ = ItemIndex.load(f"{root}/{name}").search(vectors(50)[:1], 3)
    assert rows.shape == (1, 3)
made = lambda: build(vectors(400), InvertedLists())
for attempt in (made, lambda: ItemIndex.load(root + "/ivf")):
    with pytest.raises(InputError, match=r"--kind: 'ivf' needs the package faiss-cpu.*flat"):
        attempt()
"""


def test_it_finds_what_faiss_finds_in_as_many_parts_as_memory_asks(monkeypatch) -> None:
    items, queries = vectors(300), vectors(7, seed=1)
    index = faiss.IndexFlatIP(8)
    index.add(items)
    scores, rows = index.search(queries, 20)
    for at_once in (exact.SCORES_AT_ONCE, 700, 1):
        monkeypatch.setattr(exact, "SCORES_AT_ONCE", at_once)
        found = ExactSearch(items).search(queries, 20)
        assert np.array_equal(found[1], rows)
        np.testing.assert_allclose(found[0], scores, rtol=1e-5, atol=1e-6)


def test_the_file_of_earlier_versions_is_read(tmp_path: Path) -> None:
    items = vectors(30)
    index = faiss.IndexFlatIP(8)
    index.add(items)
    build(items).save(str(tmp_path))
    (tmp_path / "vectors.npy").unlink()
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    assert np.array_equal(ItemIndex.load(str(tmp_path)).engine.vectors, items)


@pytest.mark.parametrize("kept", [0, 20, -4])
def test_a_cut_file_is_refused_by_its_folder(tmp_path: Path, kept: int) -> None:
    build(vectors(30)).save(str(tmp_path))
    file = tmp_path / "vectors.npy"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match="is damaged"):
        ItemIndex.load(str(tmp_path))


def test_only_approximate_search_needs_faiss_and_says_so(tmp_path: Path) -> None:
    build(vectors(400)).save(str(tmp_path / "flat"))
    build(vectors(400), InvertedLists()).save(str(tmp_path / "ivf"))
    command = [sys.executable, "-c", WITHOUT_FAISS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr

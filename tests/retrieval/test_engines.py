"""Shards give the answer of the whole, ties included; files are mapped; filters leave k."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from karma_ray.artifacts import open_filesystem
from karma_ray.retrieval.exact import ExactSearch
from karma_ray.retrieval.index import ItemIndex
from karma_ray.retrieval.kinds import IndexKind
from tests.retrieval.test_index import build, vectors
from tests.retrieval.test_kinds import built, by_kind, items_for


def sharded(items: np.ndarray, num_shards: int, kind: IndexKind | None = None) -> ItemIndex:
    whole = build(items)
    return ItemIndex.build(items, whole.item_ids, whole.titles, kind, num_shards=num_shards)


@pytest.mark.parametrize("num_shards", [1, 2, 7])
@pytest.mark.parametrize("width", [8, 67])
def test_shards_give_the_answer_of_the_whole_with_ties_by_row(width: int, num_shards: int) -> None:
    items = np.concatenate([vectors(301, width), vectors(301, width), vectors(40, width, 5)])
    items[100:140] = items[0]  # more ties than are looked at beyond k
    queries = np.concatenate([vectors(5, width, 1), items[:1]])
    scores = (queries.astype(np.float64) @ items.T.astype(np.float64)).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")
    for k in (1, 30, len(items)):
        rows, found = sharded(items, num_shards).search(queries, k)
        assert np.array_equal(rows, order[:, :k])
        assert np.array_equal(found, np.take_along_axis(scores, order[:, :k], 1))


@pytest.mark.parametrize("case", ["spread", "few at the top", "equal", "masked"])
def test_a_large_catalogue_is_searched_as_exactly_as_a_small_one(case: str) -> None:
    items = vectors(9_000)
    if case == "few at the top":  # where the sample of scores sees none of the best
        items[np.arange(9_000) % 16 != 0] *= 3
    if case == "equal":
        items[:] = items[0]
    allowed = np.arange(9_000) % 700 == 3 if case == "masked" else np.ones(9_000, bool)
    queries = vectors(3, seed=1)
    scores = (queries.astype(np.float64) @ items.T.astype(np.float64)).astype(np.float32)
    scores[:, ~allowed] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :30]
    best = np.take_along_axis(scores, order, 1)
    rows, found = build(items).search(queries, 30, None if allowed.all() else allowed)
    assert np.array_equal(rows, np.where(best == -np.inf, -1, order))
    assert np.array_equal(found, best)


def test_the_answer_does_not_depend_on_how_many_ask_together() -> None:
    items, queries = vectors(500, 33), vectors(64, 33, seed=1)
    index = build(items)
    together = index.search(queries, 50)
    for number in (0, 31, 63):
        alone = index.search(queries[number : number + 1], 50)
        assert all(np.array_equal(a[0], b[number]) for a, b in zip(alone, together, strict=True))


@by_kind
def test_shards_of_every_kind_survive_their_files(kind: IndexKind, tmp_path: Path) -> None:
    items, queries = items_for(kind), vectors(3, seed=1)
    num_shards = 1 if kind.kind == "ivfpq" else 3
    made = built(kind) if num_shards == 1 else sharded(items, num_shards, kind)
    assert made.recall > 0.9
    made.save(str(tmp_path / "index"))
    loaded = ItemIndex.load(str(tmp_path / "index"))
    assert loaded.num_shards == num_shards
    pairs = zip(made.search(queries, 20), loaded.search(queries, 20), strict=True)
    assert all(np.array_equal(before, after) for before, after in pairs)


def test_an_exact_index_is_mapped_and_outlives_its_replacement(tmp_path: Path) -> None:
    folder, queries = str(tmp_path / "index"), vectors(2, seed=1)
    build(vectors(50)).save(folder)
    old = ItemIndex.load(folder)
    assert isinstance(old.engine, ExactSearch)
    base = old.engine.vectors.base
    while base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap) and old.engine.vectors.flags.aligned
    assert old.engine.tensor.data_ptr() == old.engine.vectors.ctypes.data
    before = old.search(queries, 9)
    build(vectors(60, seed=4)).save(folder)
    assert all(np.array_equal(a, b) for a, b in zip(before, old.search(queries, 9), strict=True))
    assert ItemIndex.load(folder).num_items == 60


def test_a_remote_index_is_replaced_whole() -> None:
    folder = "memory://runs/b/index"
    sharded(vectors(40), 4).save(folder)
    build(vectors(10)).save(folder)
    fs, path = open_filesystem(folder)
    names = sorted(name.rsplit("/", 1)[-1] for name in fs.find(path))
    assert names == ["item_ids.parquet", "manifest.json", "vectors.npy"]
    assert ItemIndex.load(folder).num_items == 10


@by_kind
@pytest.mark.parametrize("share", [0.02, 0.6])
def test_a_filtered_search_finds_k_allowed_items_if_there_are_k(
    kind: IndexKind, share: float
) -> None:
    items, queries = items_for(kind), vectors(4, seed=1)
    allowed = np.random.default_rng(3).random(len(items)) < share
    rows, scores = built(kind).search(queries, 15, allowed)
    assert allowed[rows].all() and np.isfinite(scores).all()
    assert all(len(set(found)) == 15 for found in rows.tolist())
    exact = np.where(allowed, queries @ items.T, -np.inf)
    best = np.argsort(-exact, axis=1)[:, :15]
    hits = [len(np.intersect1d(a, b)) for a, b in zip(rows, best, strict=True)]
    assert np.mean(hits) > 13


@by_kind
def test_a_filter_that_leaves_fewer_than_k_gives_them_all(kind: IndexKind) -> None:
    items = items_for(kind)
    allowed = np.zeros(len(items), bool)
    allowed[[7, 500, 901]] = True
    rows, scores = built(kind).search(vectors(1, seed=1), 10, allowed)
    assert sorted(rows[0, :3]) == [7, 500, 901]
    assert (rows[0, 3:] == -1).all() and (scores[0, 3:] == -np.inf).all()

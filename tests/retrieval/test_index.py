"""The index finds what exact search finds, survives a round trip and refuses skew."""

from __future__ import annotations

import numpy as np
import pytest

from karma_ray.errors import InputError, SkewError
from karma_ray.retrieval.index import ItemIndex
from karma_ray.retrieval.kinds import Flat, IndexKind, InvertedLists, index_kind


def vectors(count: int, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def build(items: np.ndarray, kind: IndexKind | None = None) -> ItemIndex:
    ids = [f"i{row}" for row in range(len(items))]
    titles = [f"title {row}" for row in range(len(items))]
    parents = {"bundle": "b1", "item_embeddings": "e1"}
    return ItemIndex.build(items, ids, titles, kind, parents)


def test_flat_search_is_the_exact_top_k() -> None:
    items, queries = vectors(300), vectors(7, seed=1)
    exact = queries @ items.T
    rows, scores = build(items).search(queries, 20)
    assert np.array_equal(rows, np.argsort(-exact, axis=1)[:, :20])
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :20], rtol=1e-5, atol=1e-6)


def test_more_results_than_items_gives_all_items() -> None:
    rows, scores = build(vectors(3)).search(vectors(2, seed=1), 10)
    assert rows.shape == scores.shape == (2, 3)
    assert sorted(rows[0]) == [0, 1, 2]


@pytest.mark.parametrize("kind", [Flat(), InvertedLists(num_lists=4, num_probes=2)])
def test_a_saved_index_answers_the_same(tmp_path, kind) -> None:
    index, queries = build(vectors(400), kind), vectors(5, seed=1)
    saved = index.save(str(tmp_path / "index"))
    loaded = ItemIndex.load(str(tmp_path / "index"), bundle_hash="b1")
    for before, after in zip(index.search(queries, 9), loaded.search(queries, 9), strict=True):
        assert np.array_equal(before, after)
    assert (loaded.item_ids, loaded.titles) == (index.item_ids, index.titles)
    assert (loaded.kind, loaded.parameters) == (index.kind, index.parameters)
    assert loaded.recall == index.recall and loaded.parents == index.parents
    assert loaded.content_hash == saved.content_hash != ""


def test_an_index_can_be_kept_on_any_fsspec_filesystem() -> None:
    index = build(vectors(10))
    index.save("memory://runs/a/index")
    assert ItemIndex.load("memory://runs/a/index").item_ids == index.item_ids


def test_measured_recall_is_one_when_exact_and_less_when_few_cells_are_read() -> None:
    items = vectors(2000, width=16)
    assert build(items).recall == 1.0
    assert build(items, InvertedLists(num_lists=32, num_probes=32)).recall == 1.0
    assert 0.0 < build(items, InvertedLists(num_lists=32, num_probes=1)).recall < 0.9


def test_an_approximate_search_that_runs_dry_fills_with_row_minus_one() -> None:
    index = build(vectors(200), InvertedLists(num_lists=5, num_probes=1))
    rows, scores = index.search(vectors(1, seed=3), 200)
    assert rows[0, 0] >= 0 and rows[0, -1] == -1 and scores[0, -1] == -np.inf


def test_an_index_of_another_bundle_is_refused(tmp_path) -> None:
    build(vectors(5)).save(str(tmp_path))
    with pytest.raises(SkewError, match=r"bundle b1.*here is b2"):
        ItemIndex.load(str(tmp_path), bundle_hash="b2")


def test_an_empty_catalogue_is_refused() -> None:
    with pytest.raises(InputError, match="catalogue"):
        build(vectors(0))


def test_an_unknown_kind_names_the_choices() -> None:
    with pytest.raises(InputError, match=r"--kind: .annoy.*flat, ivf"):
        index_kind("annoy")

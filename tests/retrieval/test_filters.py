"""Requests with filters get k items if k are left, in the order of an unfiltered answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from karma_ray.errors import InputError
from karma_ray.retrieval.encode import embedding_rows, load_embeddings, save_embeddings
from karma_ray.retrieval.filters import Filter, filtered_search
from karma_ray.retrieval.index import ItemIndex
from karma_ray.retrieval.kinds import Flat, Graph, IndexKind, InvertedLists
from karma_ray.retrieval.requests import HistoryItem, Request
from karma_ray.retrieval.retriever import Retriever, build_index
from tests import tiny_run
from tests.retrieval.test_encode import table
from tests.retrieval.test_index import vectors

ITEMS = vectors(300)
IDS = [f"i{row}" for row in range(300)]
CATEGORIES = [(None, "a", "b")[row % 3] for row in range(300)]
KINDS = (Flat(), InvertedLists(num_lists=5, num_probes=1), Graph(neighbours=8, breadth=10))


def index(kind: IndexKind | None = None) -> ItemIndex:
    return ItemIndex.build(ITEMS, IDS, IDS, kind, categories=CATEGORIES)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_each_request_gets_its_k_under_its_own_filter(kind: IndexKind) -> None:
    queries = vectors(4, seed=1)[:, None]
    scores = queries[:, 0] @ ITEMS.T
    best = np.argsort(-scores, axis=1)
    gone = frozenset(IDS[row] for row in best[1, :150])
    filters = [Filter(), Filter(gone | {"nobody"}), Filter(category="a"), Filter(gone, "b")]
    ks = [5, 9, 20, 100]
    answers = filtered_search(index(kind), queries, filters, ks)
    for number, ((rows, found), one) in enumerate(zip(answers, filters, strict=True)):
        allowed = [
            row
            for row in best[number].tolist()
            if IDS[row] not in one.exclude and one.category in (None, CATEGORIES[row])
        ]
        assert len(rows) == len(set(rows)) == min(ks[number], len(allowed))
        assert set(rows) <= set(allowed)
        np.testing.assert_allclose(found, scores[number, rows], atol=1e-5)
        if kind == Flat():
            assert rows == allowed[: ks[number]]


def test_everything_excluded_leaves_nothing() -> None:
    assert filtered_search(index(), vectors(1)[:, None], [Filter(frozenset(IDS))], [5]) == [
        ([], [])
    ]


def test_a_category_that_no_item_has_is_refused() -> None:
    with pytest.raises(InputError, match="category: 'c' is the category of no item"):
        filtered_search(index(), vectors(1)[:, None], [Filter(category="c")], [5])
    plain = ItemIndex.build(ITEMS, IDS, IDS)
    with pytest.raises(InputError, match=r"no categories.*jobs/embed\.py"):
        filtered_search(plain, vectors(1)[:, None], [Filter(category="a")], [5])


def test_categories_are_kept_with_embeddings_and_index_and_older_ones_have_none(
    tmp_path: Path,
) -> None:
    made = index()
    made.save(str(tmp_path / "index"))
    assert ItemIndex.load(str(tmp_path / "index")).categories == CATEGORIES
    old = table()
    assert "category" not in embedding_rows(old.item_ids, old.titles, old.embeddings).column_names
    save_embeddings(old, str(tmp_path / "old"))
    assert load_embeddings(str(tmp_path / "old")).categories is None
    new = type(old)(old.item_ids, old.titles, old.embeddings, old.parents, ["x", None, "y"])
    save_embeddings(new, str(tmp_path / "new"))
    loaded = load_embeddings(str(tmp_path / "new"))
    assert loaded.categories == ["x", None, "y"]
    assert loaded.in_order(["c", "a", "b"]).categories == ["y", "x", None]


def test_the_retriever_takes_filters_beside_the_history(tmp_path: Path) -> None:
    loaded = Retriever.load(tiny_run.write_run(tmp_path))
    history = [HistoryItem("i3"), HistoryItem("i8")]
    everything = [item.item_id for item in loaded.recall("mug", history, 40).items]
    only = Filter(frozenset(everything[:3]))
    found = [item.item_id for item in loaded.recall("mug", history, 40, True, only).items]
    assert found == [item for item in everything[3:] if item not in ("i3", "i8")]
    two = loaded.recall_batch([Request("mug", history)] * 2, 4, filters=[Filter(), only])
    assert [[i.item_id for i in answer.items] for answer in two] == [
        everything[:4], everything[3:7],
    ]  # fmt: skip


def test_an_exact_index_shares_its_vectors_with_the_scores(tmp_path: Path) -> None:
    loaded = Retriever.load(tiny_run.write_run(tmp_path))
    engine = loaded.index.engine
    assert loaded._index_vectors.data_ptr() == engine.vectors.ctypes.data  # type: ignore[attr-defined]
    rebuilt = build_index(loaded.interest, loaded.table).engine
    assert np.array_equal(rebuilt.vectors, engine.vectors)  # type: ignore[attr-defined]

"""New items are found beside the index as if they were in it, and deleted ones never come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from karma_ray.artifacts import RunFolder, join, write_table
from karma_ray.data.catalog import Catalog
from karma_ray.data.schema import ITEMS
from karma_ray.errors import SkewError
from karma_ray.retrieval.delta import UpdatedSearch, live_items, num_live, update_run
from karma_ray.retrieval.engines import build_engine
from karma_ray.retrieval.index_build import index_run
from karma_ray.retrieval.kinds import Flat, InvertedLists
from karma_ray.retrieval.parts import delta_of, served
from karma_ray.retrieval.requests import HistoryItem, Request, request_table
from karma_ray.retrieval.retriever import Retriever, build_index
from karma_ray.serving.engine import Engine, FeaturesCall
from tests import tiny_run

HISTORY = [HistoryItem("i3", "shirt"), HistoryItem("i21", None)]


@pytest.fixture
def run(tmp_path: Path) -> str:
    tiny_run.write_data(tmp_path)
    return tiny_run.write_run(tmp_path)


def changed(run: str) -> str:
    """The data of a shop that dropped i5 and i21, renamed i7 and has three new items."""
    data = str(Path(run).parent / "changed")
    rows = [
        row for row in tiny_run.items_table().to_pylist() if row["item_id"] not in ("i5", "i21")
    ]
    rows[6]["title"] = "violet teapot"
    rows += [{"item_id": f"n{n}", "title": f"{word} mug"} for n, word in enumerate(("red", "new"))]
    write_table(pa.Table.from_pylist(rows, schema=ITEMS), join(data, "items"))
    return data


def test_a_delta_gives_what_one_index_of_all_items_gives(run: str) -> None:
    data = changed(run)
    changes = update_run(run, data)
    assert (changes.added, changes.hidden, changes.encoded) == (3, 3, 3)
    found = Retriever.load(run)
    best = found.recall("red mug", HISTORY, 40).items
    ids = [item.item_id for item in best]
    assert len(ids) == len(set(ids)) == 40 and num_live(found.index) == 40
    assert {"n0", "n1", "i7"} <= set(ids) and not {"i5", "i21"} & set(ids)
    assert {item.title for item in best if item.item_id == "i7"} == {"violet teapot"}
    catalog = Catalog.load(data)
    table = live_items(found.table, found.index).in_order(catalog.item_ids)
    whole = build_index(found.interest, table)
    vectors = found.interest.search_vectors(
        found.interests_of([Request("red mug", HISTORY)]), None
    )[:, 0].numpy()
    rows, scores = whole.search(vectors, 40)
    assert np.allclose([item.score for item in best], scores[0], atol=1e-5)
    assert ids == [whole.item_ids[row] for row in rows[0]]
    assert [item.title for item in best] == [catalog.titles[row] for row in rows[0]]
    few = found.recall("red mug", HISTORY, 5).items
    assert [i.item_id for i in few] == ids[:5]


def test_items_that_left_are_no_candidates_and_those_that_came_or_changed_are(run: str) -> None:
    update_run(run, changed(run))
    found = Retriever.load(run)
    asked = ["i5", "n0", "i21", "i7", "nobody", "i0"]
    recalled = {i.item_id: i.score for i in found.recall("red mug", HISTORY, 40).items}
    expected = [recalled.get(item) for item in asked]
    assert [score is None for score in expected] == [True, False, True, False, True, False]
    answer = found.score_items("red mug", HISTORY, asked)
    assert answer.ignored_item_ids == []  # the history may name an item that left
    for ours, theirs in zip(answer.scores, expected, strict=True):
        assert ours == (None if theirs is None else pytest.approx(theirs, abs=1e-4))
    calls = [FeaturesCall(Request("red mug", HISTORY), asked)]
    features = Engine(found, cache_bytes=0).answer(calls)[0].features
    assert [one is None for one in features] == [score is None for score in expected]


def test_what_evaluation_measures_has_the_delta_too(run: str) -> None:
    data = changed(run)
    update_run(run, data)
    measured, found = Retriever.load(run, data=data), Retriever.load(run)
    scores = measured.score(request_table([Request("red mug", HISTORY[:1])]))[0]
    assert scores.shape == (40,)
    for item in found.recall("red mug", HISTORY[:1], 40).items:
        assert scores[measured.table.row(item.item_id)] == pytest.approx(item.score, abs=1e-4)


def test_only_what_no_delta_holds_is_encoded(run: str) -> None:
    data = changed(run)
    update_run(run, data)
    version = Retriever.load(run).index_version
    again = update_run(run, data)
    assert not again.is_new and again.encoded == 0
    assert Retriever.load(run).index_version == version
    rows = [*tiny_run.items_table().to_pylist(), {"item_id": "n0", "title": "red mug"}]
    write_table(pa.Table.from_pylist(rows, schema=ITEMS), join(data, "items"))
    back = update_run(run, data)
    assert back.is_new and (back.added, back.hidden, back.encoded) == (1, 0, 0)
    assert Retriever.load(run).index_version != version


def test_a_new_index_needs_no_delta_and_one_of_another_index_is_refused(run: str) -> None:
    update_run(run, changed(run))
    earlier = served(run)
    assert delta_of(earlier) is not None
    index_run(run, InvertedLists())
    assert delta_of(served(run)) is None
    assert Retriever.load(earlier).recall("mug", [], 3).items  # it stays until the next change
    mixed = RunFolder(run, {**served(run).names, "delta": earlier.names["delta"]})
    with pytest.raises(SkewError, match="index"):
        Retriever.load(mixed)


@pytest.mark.parametrize("kind", [Flat(), InvertedLists(num_lists=4, num_probes=4)])
@pytest.mark.parametrize("hidden", [0, 7, 30], ids=["nothing", "some", "everything"])
def test_a_search_beside_any_index_is_the_search_of_what_is_left(kind, hidden: int) -> None:
    draw = np.random.default_rng(hidden)
    vectors = draw.normal(size=(40, 8)).astype(np.float32)
    gone = np.sort(draw.permutation(30)[:hidden])
    engine = UpdatedSearch(build_engine(vectors[:30], kind), 30, vectors[30:], gone)
    queries = draw.normal(size=(5, 8)).astype(np.float32)
    allowed = draw.random(40) < 0.6
    for mask in (None, allowed):
        usable = np.ones(40, bool) if mask is None else mask.copy()
        usable[gone] = False
        left = np.flatnonzero(usable)
        order = np.argsort(-queries @ vectors[left].T, axis=1)
        for k in (1, 9, 40):
            scores, rows = engine.search(queries, k, mask)
            assert scores.shape == rows.shape == (5, k)
            few = min(k, len(left))
            assert (rows[:, :few] == left[order[:, :few]]).all() and (rows[:, few:] == -1).all()
            assert np.isneginf(scores[:, few:]).all()

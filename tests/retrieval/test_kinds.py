"""Every kind answers with the inner product, keeps its promise of recall, and survives a file."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from karma_ray.artifacts import read_manifest
from karma_ray.errors import InputError
from karma_ray.retrieval import kinds
from karma_ray.retrieval.index import ItemIndex
from karma_ray.retrieval.index_recall import ProbeQueries
from karma_ray.retrieval.kinds import (
    KINDS,
    Flat,
    Graph,
    InvertedLists,
    ProductQuantised,
    ScalarQuantised,
    chosen_kind,
    describe_kinds,
    index_kind,
)
from tests.retrieval.test_index import build, vectors

SMALL = (
    Flat(), InvertedLists(num_lists=8, num_probes=4), Graph(neighbours=8), ScalarQuantised(),
    ProductQuantised(num_lists=32, num_probes=16, width_per_code=2),
)  # fmt: skip
by_kind = pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.kind)


@cache
def items_for(kind: kinds.IndexKind) -> np.ndarray:
    """As many items as the kind needs; unit vectors around a few centres, as embeddings are."""
    centres = 3 * vectors(20)
    count = 10_000 if isinstance(kind, ProductQuantised) else 1_000
    items = centres[np.arange(count) % 20] + vectors(count, seed=2)
    return items / np.linalg.norm(items, axis=1, keepdims=True)


@cache
def built(kind: kinds.IndexKind) -> ItemIndex:
    return build(items_for(kind), kind)


@by_kind
def test_every_kind_scores_by_the_inner_product_and_answers_the_same_from_its_file(
    kind: kinds.IndexKind, tmp_path: Path
) -> None:
    items, queries = items_for(kind), vectors(6, seed=1)
    made = built(kind)
    rows, scores = made.search(queries, 30)
    exact = np.take_along_axis(queries @ items.T, rows, 1)
    np.testing.assert_allclose(scores, exact, atol=1e-5)
    assert made.recalls[200] > 0.9 and set(made.recalls) == {10, 50, 200}
    made.save(str(tmp_path / "index"))
    loaded = ItemIndex.load(str(tmp_path / "index"))
    for before, after in zip((rows, scores), loaded.search(queries, 30), strict=True):
        assert np.array_equal(before, after)
    assert (loaded.kind, loaded.parameters) == (kind.kind, made.parameters)
    assert loaded.recalls == made.recalls
    assert loaded.recall_measured_on == made.recall_measured_on


def test_recall_is_measured_with_the_queries_that_are_given() -> None:
    items, kind = items_for(Flat()), InvertedLists(num_lists=20, num_probes=1)
    easy, hard = build(items, kind), 10 * vectors(300, seed=7)
    probes = ProbeQueries(hard, "300 hard ones")
    measured = ItemIndex.build(items, easy.item_ids, easy.titles, kind, probes=probes)
    assert measured.recall_measured_on == "300 hard ones"
    assert "256 item vectors" in easy.recall_measured_on
    assert measured.recalls[10] < easy.recalls[10]


def test_duplicates_count_as_each_other_when_recall_is_measured() -> None:
    items = np.repeat(vectors(4), 200, axis=0)
    assert build(items, InvertedLists(num_lists=4, num_probes=1)).recall == 1.0


def test_a_recall_below_the_promise_names_it_and_the_knob() -> None:
    items, kind = vectors(2000, width=16), InvertedLists(num_lists=32, num_probes=2)
    made = build(items, kind)
    with pytest.raises(InputError, match=rf"--min-recall: 0\.9.*{made.recall:.3f}.*num_probes=4"):
        ItemIndex.build(items, made.item_ids, made.titles, kind, min_recall=0.9)
    wide = InvertedLists(num_lists=32, num_probes=32)
    ItemIndex.build(items, made.item_ids, made.titles, wide, min_recall=0.9)


def test_a_knob_that_nobody_typed_is_raised_until_the_promise_is_kept(tmp_path: Path) -> None:
    items, kind = vectors(2000, width=16), InvertedLists(num_lists=32, num_probes=2)
    ids = build(items).item_ids
    for shards in (1, 2):
        made = ItemIndex.build(
            items, ids, ids, kind, num_shards=shards, min_recall=0.9, raise_recall=True
        )
        assert made.recall >= 0.9 and made.parameters["num_probes"] in (8, 16, 32)
        made.save(str(tmp_path / "index"))
        found = ItemIndex.load(str(tmp_path / "index")).search(items[:5], 50)
        assert all(map(np.array_equal, found, made.search(items[:5], 50)))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "flat"])
def test_the_knob_that_an_error_names_is_one_of_the_kind(name: str) -> None:
    kind = index_kind(name)
    assert kind is not None and kind.knob in vars(kind)
    assert f"{kind.knob}=" in describe_kinds()


def test_knobs_are_set_by_name_and_wrong_ones_are_refused() -> None:
    assert index_kind("ivf", ["num_probes=64"]) == InvertedLists(num_probes=64)
    assert index_kind("auto") is None and index_kind("flat") == Flat()
    for kind, knob, message in (
        ("ivf", "breadth=3", "no knob of ivf.*num_lists, num_probes"),
        ("hnsw", "breadth=0", "breadth: 0 must be at least 1"),
        ("hnsw", "breadth=many", "whole number"),
        ("auto", "breadth=9", "name it with --kind"),
        ("flat", "breadth=9", "no knob of flat"),
    ):
        with pytest.raises(InputError, match=message):
            index_kind(kind, [knob])


def test_too_few_items_for_codes_are_refused_with_other_kinds() -> None:
    with pytest.raises(InputError, match=r"ivfpq.*9984 items.*choices: flat, sq8"):
        build(vectors(400), ProductQuantised())


def test_a_large_catalogue_is_searched_approximately_unless_the_model_costs_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert chosen_kind(100_000, 128, num_weights=0) == Flat()
    assert chosen_kind(1_000_000, 128, num_weights=0) == InvertedLists()
    assert chosen_kind(1_000_000, 128, num_weights=600_000_000) == Flat()

    def missing(kind: str) -> None:
        raise InputError("--kind", kind)

    monkeypatch.setattr(kinds, "faiss_for", missing)
    assert chosen_kind(1_000_000, 128, num_weights=0) == Flat()


def test_the_manifest_says_kind_knobs_shards_and_recall(tmp_path: Path) -> None:
    build(vectors(400), InvertedLists(num_lists=4)).save(str(tmp_path / "index"))
    facts = read_manifest(str(tmp_path / "index"), "index")
    assert facts["parameters"] == {"num_lists": 4, "num_probes": 32} and facts["num_shards"] == 1
    assert facts["recall@10"] == facts["recall@50"] == facts["recall@200"] == 1.0
    assert facts["recall_measured_on"] == "256 item vectors"

"""Recall by all lists: its filters, its order, and what validation decides."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from karma_ray.artifacts import RunFolder, join, read_manifest, write_json, write_table
from karma_ray.data.prepared import PreparedData
from karma_ray.data.schema import EXAMPLES
from karma_ray.errors import InputError, SkewError
from karma_ray.metrics import ranking
from karma_ray.retrieval.blend import FEATURES, GROUPS, LISTS, Blend
from karma_ray.retrieval.blend_fit import Gathered, fitted_blend
from karma_ray.retrieval.blended import BlendedSearch, load_blended, with_channels
from karma_ray.retrieval.complete_run import check_run
from karma_ray.retrieval.delta import UpdatedSearch, update_run
from karma_ray.retrieval.exact import ExactSearch
from karma_ray.retrieval.filters import Filter, filtered_search
from karma_ray.retrieval.index_build import index_run
from karma_ray.retrieval.parts import channels_of, served
from karma_ray.retrieval.requests import HistoryItem, Request
from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving.app import build_app
from karma_ray.serving.engine import Engine, RecallCall
from karma_ray.serving.service import Service
from tests import tiny_run
from tests.retrieval import channel_run

REQUESTS = [
    Request("red mug", [HistoryItem("i3", "shirt"), HistoryItem("i21", None)]),
    Request("mug", []), Request(None, [HistoryItem("i8")]), Request(None, []),
    Request("zzz of no item", [HistoryItem("not an item")]),
    Request("scarf", [HistoryItem("i1")] * 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return channel_run.write_run(tmp_path_factory.mktemp("blended"))


@pytest.fixture(scope="module")
def dense(run: str) -> Retriever:
    return with_channels(Retriever.load(run), run, "dense")


@pytest.fixture(scope="module")
def blended(run: str) -> Retriever:
    return with_channels(Retriever.load(run), run, "blend")


def searching(retriever: Retriever) -> BlendedSearch:
    assert isinstance(retriever.blended, BlendedSearch)
    return retriever.blended


def test_weights_for_the_model_alone_give_its_answers_bit_for_bit(run, dense) -> None:
    for feature in ("dense", "rank_dense"):
        other = Retriever.load(run)
        alone = Blend("dense", {group: {feature: 2.0} for group in GROUPS})
        other.blended = replace(load_blended(served(run), other), blend=alone)
        for k in (1, 10, 40):
            assert other.recall_batch(REQUESTS, k) == dense.recall_batch(REQUESTS, k)


def test_the_order_is_that_of_the_model_where_other_features_say_nothing(run, dense) -> None:
    """Through the whole computation, with a weight too small to change the order."""
    other = Retriever.load(run)
    weights = {group: {"dense": 1.0, "seen": 1e-12} for group in GROUPS}
    other.blended = replace(load_blended(served(run), other), blend=Blend("logistic", weights))
    for one, two in zip(
        other.recall_batch(REQUESTS, 40), dense.recall_batch(REQUESTS, 40), strict=True
    ):
        assert [item.item_id for item in one.items] == [item.item_id for item in two.items]
        ours, theirs = ([item.score for item in side.items] for side in (one, two))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_validation_finds_the_blend_better_and_it_serves(run) -> None:
    facts = read_manifest(channels_of(served(run)), "channels")["weights"]
    assert facts["is_served"] and facts["measured"]["low"] > 0
    assert with_channels(Retriever.load(run), run, "auto").blended is not None
    assert with_channels(Retriever.load(run), run, "dense").blended is None
    assert set(facts["without"]) == set(LISTS)
    weights = [w for side in facts["weights"].values() for n, w in side.items() if n != "seen"]
    assert min(weights) >= 0


def test_where_validation_does_not_prefer_the_blend_the_model_serves(run, tmp_path) -> None:
    copy = str(shutil.copytree(run, tmp_path / "run"))
    manifest = read_manifest(channels_of(served(copy)))
    manifest["weights"]["is_served"] = False
    write_json(manifest, join(channels_of(served(copy)), "manifest.json"))
    assert with_channels(Retriever.load(copy), copy, "auto").blended is None
    assert with_channels(Retriever.load(copy), copy, "blend").blended is not None


def test_every_request_gets_each_item_once_and_falling_scores(blended) -> None:
    for k in (3, 40, 100):
        for answer in blended.recall_batch(REQUESTS, k):
            ids = [item.item_id for item in answer.items]
            assert len(ids) == len(set(ids)) == min(k, 40)
            scores = [item.score for item in answer.items]
            assert scores == sorted(scores, reverse=True)


def test_a_longer_list_begins_with_the_shorter_one(blended) -> None:
    short, long = blended.recall_batch(REQUESTS, 5), blended.recall_batch(REQUESTS, 40)
    for one, two in zip(short, long, strict=True):
        assert one.items == two.items[:5]


def test_filters_hold_for_every_list(blended) -> None:
    mugs = {f"i{n}" for n in range(5, 10)}
    only = Filter(frozenset({"i5", "i6", "nothing"}), "mug")
    for answer in blended.recall_batch(REQUESTS, 40, filters=[only] * len(REQUESTS)):
        assert {item.item_id for item in answer.items} == mugs - {"i5", "i6"}
    answer = blended.recall("red mug", REQUESTS[0].history, 40, exclude_history=True)
    assert not {"i3", "i21"} & {item.item_id for item in answer.items} and len(answer.items) == 38
    with pytest.raises(InputError, match="is the category of no item"):
        blended.recall("mug", [], 5, only=Filter(category="boat"))


def test_a_request_alone_and_among_others_is_answered_alike(run, blended) -> None:
    engine = Engine(blended, 2**20)
    together = engine.answer([RecallCall(request, 12) for request in REQUESTS])
    for request, answer in zip(REQUESTS, together, strict=True):
        alone = engine.answer([RecallCall(request, 12)])[0]
        assert [i.item_id for i in alone.items] == [i.item_id for i in answer.items]


def test_what_evaluation_ranks_is_what_is_served(run, blended) -> None:
    data = PreparedData.load(read_manifest(run)["data"])
    examples = data.examples("test")
    offline = Retriever.load(run, data.items_uri)
    search = load_blended(served(run), offline)
    ranks = Gathered.of(offline, search.channels, examples).ranks(search.blend)
    for row, rank in zip(examples.to_pylist(), ranks.tolist(), strict=True):
        columns = (row[f"history_{name}"] for name in ("item_ids", "queries", "timestamps"))
        history = [HistoryItem(*click) for click in zip(*columns, strict=True)]
        ids = [item.item_id for item in blended.recall(row["query"], history, 40).items]
        assert ids.index(row["positive_item_id"]) + 1 == rank


def test_the_features_do_not_depend_on_the_order_of_the_catalogue(run, tmp_path) -> None:
    data = PreparedData.load(read_manifest(run)["data"])
    items = data.catalog().table.take(pa.array(np.arange(40)[::-1]))
    write_table(items, join(str(tmp_path), "items"))
    ranks = []
    for uri in (data.items_uri, str(tmp_path)):
        retriever = Retriever.load(run, uri)
        search = load_blended(served(run), retriever)
        found = Gathered.of(retriever, search.channels, data.examples("test"))
        ranks.append(found.ranks(search.blend).tolist())
    assert ranks[0] == ranks[1]


def test_weights_are_fitted_without_a_look_at_the_test_clicks(tmp_path: Path) -> None:
    data = channel_run.write_data(tmp_path)
    run = tiny_run.write_run(tmp_path)
    index_run(run)
    before = read_manifest(channels_of(served(run)))["weights"]
    other = channel_run.examples(seed=99, count=60)
    write_table(other, join(data, "examples", "split=test"))
    index_run(run)
    after = read_manifest(channels_of(served(run)))
    assert channels_of(served(run)).endswith("channels-3") and after["weights"] == before


def test_few_validation_clicks_leave_the_model_alone(run) -> None:
    data = PreparedData.load(read_manifest(run)["data"])
    retriever = Retriever.load(run)
    channels = load_blended(served(run), retriever).channels
    for count in (0, 30):
        blend = fitted_blend(retriever, channels, data.examples("valid").slice(0, count))
        assert not blend.is_served and blend.is_dense("warm") and blend.is_dense("cold")


def test_equal_scores_are_in_a_fixed_order(run, blended) -> None:
    nothing = replace(searching(blended), blend=Blend("logistic", {g: {} for g in GROUPS}))
    other = Retriever.load(run)
    other.blended = nothing
    first, again = (other.recall_batch(REQUESTS, 40) for _ in range(2))
    assert first == again
    best = other.recall_batch(REQUESTS[:1], 40)[0].items
    plain = with_channels(Retriever.load(run), run, "dense").recall_batch(REQUESTS[:1], 40)[0]
    assert [item.item_id for item in best] == [item.item_id for item in plain.items]


def test_what_only_a_list_that_is_left_out_finds_is_missed(run) -> None:
    data = PreparedData.load(read_manifest(run)["data"])
    retriever = Retriever.load(run, data.items_uri)
    search = load_blended(served(run), retriever)
    found = Gathered.of(retriever, search.channels, data.examples("test"))
    blend = search.blend
    assert found.ranks(blend, "bm25").tolist() == found.ranks(blend).tolist()  # all list all
    for name in ("dense", "affinity", "popularity"):
        found.features[:, FEATURES.index(f"rank_{name}")] = 0.0
    assert (found.ranks(blend, "bm25") == ranking.MISS).all()


def test_items_that_left_are_never_found_and_new_ones_are(run, tmp_path) -> None:
    copy = str(shutil.copytree(run, tmp_path / "run"))
    rows = [row for row in PreparedData.load(read_manifest(run)["data"]).catalog().table.to_pylist()
            if row["item_id"] not in ("i5", "i21")]  # fmt: skip
    rows.append({"item_id": "new", "title": "red mug", "category": "mug"})
    changed = str(tmp_path / "changed")
    write_table(pa.Table.from_pylist(rows), join(changed, "items"))
    update_run(copy, changed)
    found = with_channels(Retriever.load(copy), copy, "blend")
    for answer in found.recall_batch(REQUESTS, 100):
        ids = {item.item_id for item in answer.items}
        assert "new" in ids and not {"i5", "i21"} & ids and len(ids) == 39
    answer = found.recall("mug", [HistoryItem("new")], 40, exclude_history=True)
    assert "new" not in {item.item_id for item in answer.items}


def changed_run(run: str, folder: Path, *items: dict[str, str | None]) -> Retriever:
    """A copy of the run that knows `items` by a delta, in place of those with the same id."""
    copy = str(shutil.copytree(run, folder / "run"))
    rows = PreparedData.load(read_manifest(run)["data"]).catalog().table.to_pylist()
    ids = {item["item_id"] for item in items}
    rows = [row for row in rows if row["item_id"] not in ids]
    write_table(pa.Table.from_pylist([*rows, *items]), join(str(folder / "changed"), "items"))
    update_run(copy, str(folder / "changed"))
    return with_channels(Retriever.load(copy), copy, "blend")


def told(retriever: Retriever, request: Request) -> dict[str, dict[str, float]]:
    """The features of the candidates of a request, by item id."""
    search = searching(retriever)
    (vector,) = retriever.vectors_of(example(request))
    history = search.history([click.item_id for click in request.history], retriever)
    best = filtered_search(retriever.index, vector[None], [Filter()], [200])[0][0]
    allowed = search.allowed(retriever, Filter())
    found = search.found(retriever, vector, request.query, history, best, allowed)
    ids = [retriever.index.item_ids[row] for row in found.rows]
    named = (dict(zip(FEATURES, row, strict=True)) for row in found.features.tolist())
    return dict(zip(ids, named, strict=True))


def example(request: Request) -> pa.Table:
    steps = request.history
    row = {"user_id": "u", "query": request.query, "timestamp": channel_run.NOW,
           "history_item_ids": [step.item_id for step in steps],
           "history_queries": [step.query for step in steps],
           "history_timestamps": [None] * len(steps), "positive_item_id": "i0"}  # fmt: skip
    return pa.Table.from_pylist([row], schema=EXAMPLES)


def test_a_new_item_is_scored_as_the_one_that_is_most_like_it_but_without_clicks(
    run: str, tmp_path: Path
) -> None:
    found = changed_run(run, tmp_path, {"item_id": "new", "title": "red mug", "category": "mug"})
    engine = found.index.engine
    assert isinstance(engine, UpdatedSearch) and isinstance(engine.main, ExactSearch)
    like = int(np.argmax(engine.main.vectors @ engine.added[0]))
    title = found.index.titles[like]
    request = Request(title, [HistoryItem("i2"), HistoryItem("i22")])
    features = told(found, request)
    new, old = features["new"], features[found.index.item_ids[like]]
    for name in ("bm25_query", "bm25_history", "affinity", "matches", "rank_bm25", "rank_affinity"):
        assert new[name] == pytest.approx(old[name]), name
    assert new["matches"] == 1 and new["bm25_query"] > 0 and new["rank_bm25"] > 0
    assert new["clicks"] == new["rank_popularity"] == 0 < new["clicks_or_mean"]
    by_content = {"matches": 5.0, "bm25_query": 1.0, "affinity": 1e-3}
    found.blended = replace(
        searching(found), blend=Blend("logistic", {group: by_content for group in GROUPS})
    )
    ids = [item.item_id for item in found.recall(title, request.history, 41).items]
    others = [item for item, said in features.items() if not said["matches"]]
    assert others and ids.index("new") < min(ids.index(item) for item in others)


def test_an_item_that_is_described_anew_keeps_its_places_and_its_clicks(
    run: str, blended: Retriever, tmp_path: Path
) -> None:
    catalog = PreparedData.load(read_manifest(run)["data"]).catalog().table.to_pylist()
    old = next(row for row in catalog if row["item_id"] == "i7")
    found = changed_run(run, tmp_path, {**old, "title": f"{old['title']} again"})
    request = Request("mug", [HistoryItem("i7"), HistoryItem("i22")])
    before, after = told(blended, request)["i7"], told(found, request)["i7"]
    for name in FEATURES:
        if name not in ("dense", "rank_dense"):
            assert after[name] == pytest.approx(before[name]), name
    assert before["seen"] > 0 and before["rank_popularity"] > 0
    ids = [item.item_id for item in found.recall("mug", request.history, 40).items]
    assert ids.count("i7") == 1 and len(ids) == 40
    answer = found.recall("mug", request.history, 40, exclude_history=True)
    assert "i7" not in {item.item_id for item in answer.items}
    answer = found.recall("mug", [], 40, only=Filter(category="scarf"))
    assert "i7" not in {item.item_id for item in answer.items}


def test_skewed_and_missing_channels_are_refused(run, tmp_path) -> None:
    copy = str(shutil.copytree(run, tmp_path / "run"))
    folder = channels_of(served(copy))
    manifest = read_manifest(folder)
    manifest["parents"]["index"] = "another"
    write_json(manifest, join(folder, "manifest.json"))
    with pytest.raises(SkewError, match="made from index another"):
        check_run(copy)
    shutil.rmtree(folder)
    check_run(copy)
    assert with_channels(Retriever.load(copy), copy, "auto").blended is None
    with pytest.raises(InputError, match="needs channels/"):
        with_channels(Retriever.load(copy), copy, "blend")
    with pytest.raises(InputError, match="--channels"):
        with_channels(Retriever.load(copy), RunFolder(copy), "both")


def test_the_endpoint_serves_what_validation_prefers_and_says_so(run) -> None:
    for mode, lists in (("auto", "blend"), ("dense", "dense")):
        service = Service.load(run, channels=mode)
        with TestClient(build_app(service)) as client:
            assert client.get("/v1/version").json()["channels"] == lists
            body = {"query": "red mug", "history": [{"item_id": "i3"}], "k": 5}
            found = client.post("/v1/recall", json=body).json()["items"]
        retriever = with_channels(Retriever.load(run), run, mode)
        wanted = retriever.recall("red mug", [HistoryItem("i3")], 5).items
        assert [item["item_id"] for item in found] == [item.item_id for item in wanted]


def test_the_verdict_of_validation_is_a_sentence() -> None:
    measured = {"depth": 50, "HR": {"dense": 65.3, "logistic": 78.75}, "gain": 13.45, "low": 11.68,
                "high": 15.29}  # fmt: skip
    said = Blend("logistic", {}, True, measured).verdict
    assert "the blend of all lists" in said and "78.8 blended and 65.3" in said
    assert "+13.4 [+11.7, +15.3]" in said
    assert "too few clicks" in Blend("dense", {}).verdict

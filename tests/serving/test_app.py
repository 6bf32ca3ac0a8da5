"""The HTTP surface answers as documented."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from karma_ray.retrieval.requests import HistoryItem
from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving.app import build_app
from karma_ray.serving.schemas import MAX_K
from karma_ray.serving.service import Service
from tests import tiny_run

BODY = {
    "query": "red mug",
    "history": [
        {"item_id": "i3", "query": "shirt", "timestamp": "2024-01-01T10:00:00Z"},
        {"item_id": "i21", "timestamp": "2024-01-02T10:00:00"},
        {"item_id": "unheard of", "timestamp": 1704300000},
    ],
    "user_id": "u1",
    "k": 5,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return tiny_run.write_run(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def retriever(run: str) -> Retriever:
    return Retriever.load(run)


@pytest.fixture(scope="module")
def client(retriever: Retriever) -> Iterator[TestClient]:
    with TestClient(build_app(Service(retriever))) as found:
        yield found


def test_recall_answers_with_the_documented_fields(client, retriever: Retriever) -> None:
    answer = client.post("/v1/recall", json=BODY)
    assert answer.status_code == 200
    found = answer.json()
    assert set(found) == {"items", "ignored_item_ids", "model_version", "index_version"}
    assert found["ignored_item_ids"] == ["unheard of"]
    history = [HistoryItem("i3", "shirt"), HistoryItem("i21")]
    expected = retriever.recall("red mug", history, 5).items
    assert [(i["item_id"], i["title"]) for i in found["items"]] == [
        (i.item_id, i.title) for i in expected
    ]
    assert [i["score"] for i in found["items"]] == pytest.approx([i.score for i in expected])


def test_versions_are_the_content_hashes_of_bundle_and_index(client, run: str) -> None:
    found = client.get("/v1/version").json()
    for name, part in (("model_version", "bundle"), ("index_version", "index")):
        manifest = json.loads(Path(run, part, "manifest.json").read_text())
        assert found[name] == manifest["content_hash"]
    assert client.post("/v1/recall", json={}).json()["index_version"] == found["index_version"]


def test_health_and_docs_answer(client) -> None:
    assert client.get("/v1/healthz").json() == {"status": "ok", "num_items": 40}
    assert client.get("/docs").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/recall", "/v1/score", "/v1/healthz", "/v1/version"} <= set(paths)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"query": None, "history": []},
        {"query": "", "history": [{"item_id": "i1"}]},
        {"query": "mug"},
        {"query": "红色 杯子 🫖"},
        {"history": [{"item_id": "nobody"}]},
    ],
    ids=["nothing", "nulls", "no query", "no history", "unseen letters", "unknown history"],
)
def test_empty_and_odd_requests_still_get_ten_items(client, body) -> None:
    answer = client.post("/v1/recall", json=body)
    assert answer.status_code == 200 and len(answer.json()["items"]) == 10


def test_k_beyond_the_catalogue_gives_all_items_and_exclusion_takes_the_known(client) -> None:
    everything = client.post("/v1/recall", json={**BODY, "k": MAX_K}).json()["items"]
    assert len(everything) == 40
    left = client.post("/v1/recall", json={**BODY, "k": MAX_K, "exclude_history": True}).json()
    assert {i["item_id"] for i in everything} - {i["item_id"] for i in left["items"]} == {
        "i3",
        "i21",
    }


def test_score_gives_the_scores_of_recall_in_the_asked_order(client) -> None:
    request = {"query": BODY["query"], "history": BODY["history"]}
    best = client.post("/v1/recall", json={**request, "k": 3}).json()["items"]
    ids = [best[2]["item_id"], "nobody", best[0]["item_id"]]
    found = client.post("/v1/score", json={**request, "item_ids": ids}).json()
    assert found["scores"][1] is None and found["ignored_item_ids"] == ["unheard of"]
    assert found["scores"][0] == pytest.approx(best[2]["score"], abs=1e-4)
    assert found["scores"][2] == pytest.approx(best[0]["score"], abs=1e-4)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("recall", {"k": 0}, ["body", "k"]),
        ("recall", {"k": MAX_K + 1}, ["body", "k"]),
        ("recall", {"k": "many"}, ["body", "k"]),
        ("recall", {"query": 3}, ["body", "query"]),
        ("recall", {"query": "x" * 5000}, ["body", "query"]),
        ("recall", {"history": "i1"}, ["body", "history"]),
        ("recall", {"history": [{"query": "mug"}]}, ["body", "history", 0, "item_id"]),
        ("recall", {"history": [{"item_id": ""}]}, ["body", "history", 0, "item_id"]),
        (
            "recall",
            {"history": [{"item_id": "i1", "timestamp": "yesterday"}]},
            ["body", "history", 0, "timestamp"],
        ),
        ("recall", {"exclude_histroy": True}, ["body", "exclude_histroy"]),
        ("score", {"query": "mug"}, ["body", "item_ids"]),
        ("score", {"item_ids": []}, ["body", "item_ids"]),
    ],
)
def test_bad_input_is_422_and_names_the_field(client, path, body, field) -> None:
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 422
    assert [error["loc"] for error in answer.json()["detail"]] == [field]


@pytest.mark.parametrize("body", [b"not json", b'{"query": "\\ud800"}', b"[]", b""])
def test_a_body_that_is_no_request_is_422(client, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    assert client.post("/v1/recall", content=body, headers=headers).status_code == 422


def test_unwanted_items_and_categories_are_left_out_and_unknown_ones_are_named(client) -> None:
    best = [i["item_id"] for i in client.post("/v1/recall", json={**BODY, "k": 40}).json()["items"]]
    without = {**BODY, "exclude": [best[0], best[2], "nobody"]}
    found = [i["item_id"] for i in client.post("/v1/recall", json=without).json()["items"]]
    assert found == [item for item in best if item not in without["exclude"]][:5]
    answer = client.post("/v1/recall", json={**BODY, "category": "hats"})
    assert answer.status_code == 422 and answer.json()["detail"][0]["loc"] == ["body", "category"]

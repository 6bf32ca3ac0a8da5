"""Candidates come back by their chance of a click, which is what the model gives them offline.

Covers serving/ranking.py and `/v1/rank`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from karma_ray.artifacts import join, write_table
from karma_ray.errors import InputError
from karma_ray.ranking.config import RankingConfig
from karma_ray.ranking.exposures import EXPOSURES
from karma_ray.ranking.load import load_ranker
from karma_ray.ranking.vectors import Vectors, with_features
from karma_ray.retrieval.filters import filtered_search
from karma_ray.retrieval.parts import served
from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving import schemas
from karma_ray.serving.app import build_app
from karma_ray.serving.client import AsyncClient, EndpointError
from karma_ray.serving.engine import Engine
from karma_ray.serving.ranking import ServedRanker, check_ranker
from karma_ray.serving.service import Service
from tests import tiny_ranker, tiny_run

CONFIGS = {
    "din": RankingConfig(family="din"),
    "simtier": RankingConfig(family="simtier", max_history=3),
    "qarm": RankingConfig(family="qarm", max_history=4, recent_items=2, gsu_items=2),
    "interest": RankingConfig(family="simtier", interest=True, max_history=3),
}
CLICKS = ["i3", "i21", "i8", "i30", "i3"]
"""More than the rankers with max_history=3 read."""
IDS = [f"i{n}" for n in (5, 0, 39, 17, 3, 22)]


class Endpoint:
    """A ranker beside the tiny run, and the parts to compute its rates offline."""

    def __init__(self, root: Path, run: str, config: RankingConfig) -> None:
        self.run, self.config = run, config
        self.items_uri = tiny_ranker.write_items(root)
        self.run2 = tiny_ranker.write_ranker(root, run, config, self.items_uri)
        self.service = Service.load(run, ranker=self.run2)
        self.client = TestClient(build_app(self.service))

    def ask(self, **body) -> dict:
        answer = self.client.post("/v1/rank", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def offline(self, query: str | None, history: list[str], ids: list[str]) -> dict[str, float]:
        """Rate a page of exposures with the plain model, as training reads it."""
        ranker = load_ranker(self.run2)
        row = dict.fromkeys(EXPOSURES.names) | {
            "query": query,
            "history_rows": ranker.rows(history)[-self.config.max_history :],
            "history_queries": [None] * len(history[-self.config.max_history :]),
            "history_timestamps": [None] * len(history[-self.config.max_history :]),
            "candidate_rows": ranker.rows(ids), "clicked": [False] * len(ids), "later_rows": [],
        }  # fmt: skip
        rows = pa.Table.from_pylist([row], schema=EXPOSURES)
        if ranker.num_features:
            vectors = Vectors.load(self.run, self.items_uri, self.config.interest)
            rows = with_features(rows, vectors)
        rates = ranker.probabilities(ranker.collator(rows))
        return dict(zip(ids, rates.tolist(), strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("ranked")
    return tiny_run.write_run(root)


@pytest.fixture(scope="module", params=CONFIGS)
def endpoint(request, tmp_path_factory, run: str) -> Endpoint:
    found = Endpoint(tmp_path_factory.mktemp(request.param), run, CONFIGS[request.param])
    yield found
    found.service.close()


def asking(service: Service) -> AsyncClient:
    transport = httpx.ASGITransport(build_app(service))
    return AsyncClient("http://endpoint", transport=transport)


@pytest.mark.parametrize("query", ["red mug", None, ""])
@pytest.mark.parametrize("clicks", [CLICKS, CLICKS[:2], []], ids=["long", "short", "none"])
def test_an_endpoint_gives_the_rates_of_the_plain_model_offline(endpoint, query, clicks) -> None:
    history = [{"item_id": i} for i in clicks]
    found = endpoint.ask(query=query, history=history, item_ids=IDS)
    expected = endpoint.offline(query, clicks, IDS)
    assert {i["item_id"]: i["ctr"] for i in found["items"]} == pytest.approx(expected, abs=1e-5)
    rates = [item["ctr"] for item in found["items"]]
    assert rates == sorted(rates, reverse=True) and all(0 < rate < 1 for rate in rates)
    assert len(set(np.round(rates, 4))) > 3


def test_an_answer_has_the_documented_fields(endpoint) -> None:
    found = endpoint.ask(query="red", history=[{"item_id": "i3"}], item_ids=IDS[:2])
    assert set(found) == {
        "items", "ignored_item_ids", "stages_ms", "model_version", "index_version",
        "ranker_version",
    }  # fmt: skip
    assert set(found["items"][0]) == {"item_id", "ctr", "score", "title"}
    assert set(found["stages_ms"]) == {"recall", "features", "rank"}
    version = endpoint.client.get("/v1/version").json()
    assert found["ranker_version"] == version["ranker_version"] != ""
    scores = endpoint.client.post(
        "/v1/score", json={"query": "red", "history": [{"item_id": "i3"}], "item_ids": IDS[:2]}
    ).json()["scores"]
    by_id = {item["item_id"]: item["score"] for item in found["items"]}
    assert [by_id[i] for i in IDS[:2]] == pytest.approx(scores, abs=1e-5)


def test_without_candidates_those_of_recall_are_ranked(endpoint) -> None:
    body = {"query": "blue lamp", "history": [{"item_id": i} for i in CLICKS], "k": 7}
    for more in ({}, {"exclude_history": True}, {"exclude": ["i1", "i2"]}):
        recalled = endpoint.client.post("/v1/recall", json={**body, **more}).json()["items"]
        found = endpoint.ask(**body, **more)["items"]
        assert {i["item_id"]: i["title"] for i in found} == {
            i["item_id"]: i["title"] for i in recalled
        }
        expected = endpoint.offline("blue lamp", CLICKS, [i["item_id"] for i in recalled])
        assert {i["item_id"]: i["ctr"] for i in found} == pytest.approx(expected, abs=1e-5)


class Halved:
    """Recall whose scores are not h_t . e, as those of blended lists are not."""

    def search(self, retriever, vectors, requests, filters, ks) -> list:
        found = filtered_search(retriever.index, vectors, filters, ks)
        return [(rows, [score / 2 for score in scores]) for rows, scores in found]


def test_scores_of_blended_lists_are_not_taken_for_the_interest(endpoint) -> None:
    retriever = endpoint.service.engine.retriever
    body = {"query": "blue lamp", "history": [{"item_id": i} for i in CLICKS[:2]], "k": 7}
    plain = endpoint.ask(**body)["items"]
    retriever.blended = Halved()
    try:
        found = endpoint.ask(**body)["items"]
    finally:
        retriever.blended = None
    assert [i["ctr"] for i in found] == pytest.approx([i["ctr"] for i in plain], abs=1e-6)
    assert [i["score"] for i in found] == pytest.approx([i["score"] / 2 for i in plain])


def test_unknown_candidates_are_listed_and_repeated_ones_ranked_once(endpoint) -> None:
    found = endpoint.ask(history=[{"item_id": "gone"}], item_ids=["i1", "nobody", "i1"])
    assert [item["item_id"] for item in found["items"]] == ["i1"]
    assert found["ignored_item_ids"] == ["gone", "nobody"]
    assert endpoint.ask(item_ids=["nobody"])["items"] == []


def test_requests_that_are_computed_together_get_their_own_rates(endpoint) -> None:
    bodies = [
        {"query": query, "history": [{"item_id": i} for i in clicks], "item_ids": ids}
        for query, clicks, ids in [
            ("red", CLICKS, IDS), (None, [], IDS[:2]), ("blue lamp", CLICKS[:1], IDS[2:]),
            ("mug", ["nobody"], ["nobody"]), ("", CLICKS, [f"i{n}" for n in range(40)]),
        ]
    ]  # fmt: skip
    alone = [endpoint.ask(**body)["items"] for body in bodies]

    async def together() -> list[list[dict]]:
        transport = httpx.ASGITransport(build_app(endpoint.service))
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client:
            asked = [client.post("/v1/rank", json=body) for body in bodies * 3]
            return [answer.json()["items"] for answer in await asyncio.gather(*asked)]

    for found, expected in zip(asyncio.run(together()), alone * 3, strict=True):
        assert {i["item_id"]: i["ctr"] for i in found} == pytest.approx(
            {i["item_id"]: i["ctr"] for i in expected}, abs=1e-6
        )


def test_the_side_of_a_request_is_computed_once_and_changes_nothing(endpoint) -> None:
    retriever = Retriever.load(endpoint.run)
    asked = {"history": [{"item_id": i} for i in CLICKS], "item_ids": IDS, "query": "red"}
    found = []
    for mari in (True, False):
        ranker = ServedRanker(load_ranker(endpoint.run2), retriever, mari)
        assert (ranker.reason == "") is mari
        service = Service(retriever)
        service.swap(Engine(retriever, 0, ranker=ranker))
        with TestClient(build_app(service)) as client:
            found.append(client.post("/v1/rank", json=asked).json()["items"])
    for one, other in zip(*found, strict=True):
        assert one["item_id"] == other["item_id"]
        assert one["ctr"] == pytest.approx(other["ctr"], abs=1e-6)


def test_the_metrics_have_the_time_of_every_stage(endpoint) -> None:
    endpoint.ask(item_ids=IDS)
    text = endpoint.client.get("/metrics").text
    for stage in ("recall", "features", "rank"):
        assert f'karma_ray_rank_seconds_count{{stage="{stage}"}}' in text


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"k": 5}, "k"), ({"exclude": []}, "exclude"), ({"category": "x"}, "category"),
        ({"exclude_history": False}, "exclude_history"), ({"item_ids": []}, "item_ids"),
        ({"itemids": ["i1"]}, "itemids"),
    ],
)  # fmt: skip
def test_what_belongs_to_recall_is_refused_beside_given_candidates(endpoint, wrong, field) -> None:
    answer = endpoint.client.post("/v1/rank", json={"item_ids": IDS, **wrong})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", field]


def test_an_endpoint_without_a_ranker_says_how_to_start_one_with(run: str) -> None:
    retriever = Retriever.load(run)
    with TestClient(build_app(Service(retriever))) as client:
        answer = client.post("/v1/rank", json={"item_ids": IDS})
        assert answer.status_code == 404 and "--ranker RUN2" in answer.json()["detail"]
        assert client.get("/v1/version").json()["ranker_version"] is None
    with pytest.raises(EndpointError, match="--ranker"):
        asyncio.run(asking(Service(retriever)).rank(item_ids=IDS))


def test_the_client_ranks(endpoint) -> None:
    client = asking(endpoint.service)

    async def ask() -> list[list[schemas.RankedItem]]:
        given = await client.rank("red mug", CLICKS, item_ids=IDS)
        recalled = await client.rank("red mug", CLICKS, k=4, exclude_history=True)
        left = await client.rank(
            "red mug", CLICKS, k=4, exclude_history=True,
            exclude=[item["item_id"] for item in recalled["items"]],
        )  # fmt: skip
        return [given["items"], recalled["items"], left["items"]]

    given, recalled, left = asyncio.run(ask())
    assert not {i["item_id"] for i in left} & {i["item_id"] for i in recalled}
    history = [{"item_id": i} for i in CLICKS]
    asked = endpoint.ask(query="red mug", history=history, item_ids=IDS)["items"]
    assert [i["item_id"] for i in given] == [i["item_id"] for i in asked]
    # Not equal: one of them found the keys and values of the history that the other had stored.
    assert [i["score"] for i in given] == pytest.approx([i["score"] for i in asked], abs=1e-4)
    assert len(recalled) == len(left) == 4


def test_a_ranker_that_does_not_fit_is_refused(run: str, tmp_path: Path) -> None:
    folder, items_uri = served(run), tiny_ranker.write_items(tmp_path)
    with pytest.raises(InputError, match="has no finished ranker"):
        check_ranker(run, folder)
    others = tiny_ranker.write_ranker(
        tmp_path, run, CONFIGS["simtier"], items_uri, item_embeddings="of another model"
    )
    with pytest.raises(InputError, match="vectors of another model"):
        Service.load(run, ranker=others)


def test_a_ranker_of_another_catalogue_is_refused(run: str, tmp_path: Path) -> None:
    items = tiny_run.items_table().slice(0, 5)
    write_table(items, join(str(tmp_path / "few"), "items"))
    others = tiny_ranker.write_ranker(tmp_path, run, CONFIGS["din"], str(tmp_path / "few"))
    with pytest.raises(InputError, match=r"knows 12% of the items .* another catalogue"):
        Service.load(run, ranker=others)


def test_a_model_that_reads_what_no_request_has_is_refused(endpoint) -> None:
    ranker = load_ranker(endpoint.run2)
    ranker.model.inputs = (*ranker.model.inputs, "later")
    with pytest.raises(InputError, match="reads later, which no request has"):
        ServedRanker(ranker, Retriever.load(endpoint.run))

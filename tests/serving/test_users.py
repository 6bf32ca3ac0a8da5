"""Clicks that were sent as events stand for the history of later requests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from karma_ray.retrieval.requests import HistoryItem
from karma_ray.serving import schemas
from karma_ray.serving.app import build_app
from karma_ray.serving.service import Service
from karma_ray.serving.users import LocalUsers
from tests import tiny_run


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Service:
    return Service.load(tiny_run.write_run(tmp_path_factory.mktemp("users")))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(build_app(service)) as found:
        yield found


def test_a_user_with_events_is_answered_as_one_who_sends_them(
    client: TestClient, service: Service
) -> None:
    clicks = [
        {"item_id": "i3", "query": "shirt", "timestamp": "2024-01-01T10:00:00Z"},
        {"item_id": "i21", "timestamp": "2024-01-01T10:00:00Z"},
        {"item_id": "i8", "query": "boots", "timestamp": "2024-01-02T10:00:00Z"},
    ]
    for count, click in enumerate(clicks, 1):
        told = client.post("/v1/events", json={"user_id": "ann", **click}).json()
        assert told == {"num_clicks": count, "known": True}
    unknown = client.post("/v1/events", json={"user_id": "ann", "item_id": "nobody"}).json()
    assert unknown == {"num_clicks": 3, "known": False}
    whole = service.engine.cache.counts.whole
    stored = client.post("/v1/recall", json={"query": "mug", "user_id": "ann"}).json()
    assert service.engine.cache.counts.whole == whole + 1, "its keys and values were not stored"
    sent = client.post("/v1/recall", json={"query": "mug", "history": clicks}).json()
    assert stored == sent
    nothing = {"query": "mug", "user_id": "ann", "history": []}
    stranger = {"query": "mug", "user_id": "bob"}
    answers = [client.post("/v1/recall", json=body).json() for body in (nothing, stranger)]
    assert answers[0] == answers[1] != stored


def test_a_click_that_was_stored_is_never_answered_with_503(service: Service) -> None:
    """A client that is told 503 sends the click again, and it would count twice."""

    async def click() -> list[int]:
        full = Service(service.engine.retriever, max_waiting=0)
        body = schemas.EventRequest(user_id="eve", item_id="i3")
        return [(await full.event(body))["num_clicks"] for _ in range(2)]

    assert asyncio.run(click()) == [1, 2]


def test_replicas_that_share_a_store_know_each_others_clicks(service: Service) -> None:
    async def clicks_and_answers() -> tuple[list[int], list[list[str]]]:
        store = LocalUsers()
        replicas = [Service(service.engine.retriever, store) for _ in range(2)]
        counts, answers = [], []
        for replica, item in zip((*replicas, *replicas), ("i3", "i21", "i8", "i9"), strict=True):
            told = await replica.event(schemas.EventRequest(user_id="ann", item_id=item))
            counts.append(told["num_clicks"])
        for replica in replicas:
            found = await replica.recall(schemas.RecallRequest(user_id="ann", query="mug"))
            answers.append([item["item_id"] for item in found["items"]])
            replica.close()
        return counts, answers

    counts, answers = asyncio.run(clicks_and_answers())
    assert counts == [1, 2, 3, 4] and answers[0] == answers[1]


def test_a_store_forgets_the_oldest_clicks_and_the_users_not_heard_of() -> None:
    async def fill() -> None:
        store = LocalUsers(max_users=2)
        counts = [len(await store.append("a", HistoryItem(f"i{n}"), 3)) for n in range(8)]
        assert counts == [1, 2, 3, 4, 5, 3, 4, 5]
        assert [click.item_id for click in await store.history("a")] == [
            f"i{n}" for n in range(3, 8)
        ]
        for user in ("b", "a", "c"):
            await store.append(user, HistoryItem("i1"), 3)
        assert await store.history("b") == [] and len(await store.history("a")) == 3

    asyncio.run(fill())


def test_a_store_stays_within_its_bytes_however_long_queries_are() -> None:
    async def fill() -> None:
        store = LocalUsers(max_bytes=100_000)
        for n in range(200):
            await store.append(f"u{n % 50}", HistoryItem("i1", "x" * 4000), 10)
            assert store.num_bytes <= 100_000
        assert await store.history("u49") and not await store.history("u0")
        for _ in range(30):  # one user alone is kept, and bounded by the number of clicks
            await store.append("u49", HistoryItem("i1", "x" * 30_000), 10)
        assert 10 <= len(await store.history("u49")) < 20

    asyncio.run(fill())

"""The client against the real endpoint behind uvicorn, and against sockets that break."""

from __future__ import annotations

import asyncio
import inspect
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import uvicorn

from karma_ray.errors import InputError
from karma_ray.retrieval.requests import HistoryItem
from karma_ray.retrieval.retriever import Retriever, build_index
from karma_ray.serving import schemas
from karma_ray.serving.app import build_app
from karma_ray.serving.client import AsyncClient, Click, Client, EndpointError
from karma_ray.serving.conversation import JITTER, MAX_WAIT_S
from karma_ray.serving.service import Service
from tests import tiny_run

HISTORY = [Click("i3", "shirt", datetime(2024, 1, 1, tzinfo=UTC)), Click("i21")]


@pytest.fixture(scope="module")
def retriever(tmp_path_factory) -> Retriever:
    return Retriever.load(tiny_run.write_run(tmp_path_factory.mktemp("client")))


@contextmanager
def served(service: Service, token: str | None = None) -> Iterator[str]:
    """The application behind uvicorn, in a thread."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # a client that is faster than the server waits
        server = uvicorn.Server(uvicorn.Config(build_app(service, token), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def url(retriever: Retriever) -> Iterator[str]:
    with served(Service(retriever)) as found:
        yield found


def test_each_call_gives_what_the_endpoint_says(url: str, retriever: Retriever) -> None:
    with Client(url) as client:
        found = client.recall("red mug", HISTORY, k=5)
        expected = retriever.recall("red mug", [HistoryItem("i3", "shirt"), HistoryItem("i21")], 5)
        ids = [item["item_id"] for item in found["items"]]
        assert ids == [item.item_id for item in expected.items]
        scores = client.score([*ids, "nobody"], "red mug", HISTORY)["scores"]
        assert scores[:-1] == pytest.approx([i["score"] for i in found["items"]], abs=1e-4)
        assert scores[-1] is None
        assert client.features(["i3"], history=["i3"])["features"][0]["max"] == pytest.approx(1.0)
        assert client.healthz() == {"status": "ok", "num_items": 40}
        assert client.version()["model_version"] == found["model_version"]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("path", ["recall", "score", "rank", "features"])
def test_every_field_of_a_request_can_be_given(kind: type, path: str) -> None:
    body = getattr(schemas, f"{path.capitalize()}Request")
    taken = inspect.signature(getattr(kind, path)).parameters
    assert set(taken) - {"self"} == set(body.model_fields)


def test_unwanted_items_and_other_categories_are_left_out(retriever: Retriever) -> None:
    categories = [("a", "b")[n % 2] for n in range(retriever.table.num_items)]
    table = replace(retriever.table, categories=categories)
    index = build_index(retriever.interest, table)
    of = dict(zip(table.item_ids, categories, strict=True))
    some = Retriever(retriever.interest, retriever.collator, table, index)

    async def ask(url: str) -> schemas.RecallResponse:
        async with AsyncClient(url) as client:
            return await client.recall("mug", exclude=[best], category=of[best], k=40)

    with served(Service(some)) as url, Client(url) as client:
        best = client.recall("mug", k=1)["items"][0]["item_id"]
        for found in (
            client.recall("mug", exclude=[best], category=of[best], k=40), asyncio.run(ask(url)),
        ):  # fmt: skip
            ids = [item["item_id"] for item in found["items"]]
            assert len(ids) == 19 and best not in ids
            assert {of[item_id] for item_id in ids} == {of[best]}
        with pytest.raises(InputError, match=r"^category: 'hats' was refused"):
            client.recall(category="hats")


def test_stored_clicks_are_the_history_of_later_requests(url: str) -> None:
    with Client(url) as client:
        assert client.event("u1", "i3") == {"num_clicks": 1, "known": True}
        assert client.event("u1", Click("i7", "mug")) == {"num_clicks": 2, "known": True}
        assert client.event("u1", "nobody")["known"] is False
        stored = client.recall("lamp", user_id="u1")["items"]
        given = client.recall("lamp", ["i3", Click("i7", "mug")])["items"]
        assert [i["item_id"] for i in stored] == [i["item_id"] for i in given]


def test_both_clients_give_the_same_answers(url: str) -> None:
    async def ask() -> tuple:
        async with AsyncClient(url) as client:
            return (
                *await asyncio.gather(
                    client.recall("red mug", HISTORY), client.score(["i1"], "mug"),
                    client.features(["i1"], None, ["i2"]), client.healthz(), client.version(),
                ),
                await client.event("u2", "i1"),
            )  # fmt: skip

    *found, event = asyncio.run(ask())
    with Client(url) as client:
        expected = [
            client.recall("red mug", HISTORY), client.score(["i1"], "mug"),
            client.features(["i1"], None, ["i2"]), client.healthz(), client.version(),
        ]  # fmt: skip
    assert event["num_clicks"] == 1
    for one, other in zip(found, expected, strict=True):
        assert set(one) == set(other)
    assert [i["title"] for i in found[0]["items"]] == [i["title"] for i in expected[0]["items"]]


def test_wrong_input_names_its_field_and_value(url: str) -> None:
    with Client(url) as client:
        with pytest.raises(InputError, match=r"^k: 0 was refused: Input should be greater"):
            client.recall(k=0)
        with pytest.raises(InputError, match=r"^history\[1\]\.item_id: '' was refused"):
            client.recall(history=["i1", ""])
        with pytest.raises(InputError, match=r"^item_ids: \[\] was refused"):
            client.score([])


def test_the_token_comes_from_the_argument_or_the_environment(retriever, monkeypatch) -> None:
    with served(Service(retriever), "secret") as url:
        with Client(url) as client, pytest.raises(EndpointError, match="401: a bearer") as refused:
            client.recall()
        assert refused.value.status == 401
        with Client(url, "secret") as client:
            assert client.recall(k=1)["items"]
        monkeypatch.setenv("KARMA_RAY_TOKEN", "secret")
        with Client(url) as client:
            assert client.recall(k=1)["items"]


def test_a_full_endpoint_is_asked_again_after_what_it_says_and_a_random_part(retriever) -> None:
    service = Service(retriever, max_waiting=0)
    waits: list[float] = []

    def free(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            service._batcher.max_waiting = 8

    with served(service) as url:
        with Client(url, sleep=free, draws=random.Random(0)) as client:
            assert len(client.recall()["items"]) == 10
            assert client.event("u1", "i1")["num_clicks"] == 1
        assert len(set(waits)) == 2 and all(1.0 <= wait <= 1.0 + JITTER for wait in waits)
        service._batcher.max_waiting = 0
        with Client(url, sleep=waits.append, num_retries=1) as client:
            with pytest.raises(EndpointError, match="503: too many requests") as full:
                client.recall()
            assert full.value.status == 503 and len(waits) == 3

        async def ask() -> int:
            async def free_later(_: float) -> None:
                service._batcher.max_waiting = 8

            async with AsyncClient(url, sleep=free_later) as client:
                return len((await client.recall())["items"])

        assert asyncio.run(ask()) == 10


@contextmanager
def answering(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A socket that answers one request per connection; nothing is a lost connection."""
    seen: list[bytes] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer() -> None:
            for content in answers:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    seen.append(connection.recv(65536))
                    connection.sendall(content)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def reply(status: str, body: bytes = b"{}", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


OK = reply("200 OK", b'{"status": "ok"}')


@pytest.mark.parametrize(
    ("call", "answers", "sent"),
    [
        (Client.recall, (b"", OK), 2),
        (Client.recall, (b"", b"", OK), 2),
        (lambda client: client.event("u", "i"), (b"", OK), 1),
    ],
    ids=["once more", "not twice", "a click is not counted twice"],
)
def test_a_lost_connection_is_asked_again_once_unless_it_would_count_twice(
    call: Callable[[Client], object], answers: tuple[bytes, ...], sent: int
) -> None:
    with answering(*answers) as (url, seen), Client(url) as client:
        if answers[sent - 1]:
            assert call(client) == {"status": "ok"}
        else:
            with pytest.raises(EndpointError, match="was not answered") as error:
                call(client)
            assert error.value.status is None
        assert len(seen) == sent


LOST_REPLICA = reply("500 Error", b"Internal Server Error", content_type="text/plain")
NOT_FINITE = reply("500 Error", b'{"detail": "not finite"}', content_type="application/json")


@pytest.mark.parametrize(
    ("call", "answers", "sent"),
    [
        (Client.recall, (LOST_REPLICA, OK), 2),
        (Client.recall, (LOST_REPLICA, LOST_REPLICA), 2),
        (Client.recall, (NOT_FINITE,), 1),
        (lambda client: client.event("u", "i"), (LOST_REPLICA,), 1),
    ],
    ids=["once more", "not twice", "the endpoint's own", "a click is not counted twice"],
)
def test_an_error_of_the_host_is_asked_again_once_unless_it_would_count_twice(
    call: Callable[[Client], object], answers: tuple[bytes, ...], sent: int
) -> None:
    with answering(*answers) as (url, seen), Client(url) as client:
        if answers[-1] == OK:
            assert call(client) == {"status": "ok"}
        else:
            with pytest.raises(EndpointError, match="answered with 500") as error:
                call(client)
            assert error.value.status == 500
        assert len(seen) == sent


@pytest.mark.parametrize(
    ("said", "least"), [("7", 7.0), ("86400", MAX_WAIT_S), ("-3", 0.0), ("Wed, 21 Oct", 1.0)]
)
def test_what_retry_after_says_is_bounded(said: str, least: float) -> None:
    waits: list[float] = []
    full = reply("503 Service Unavailable", retry_after=said)
    with answering(full, OK) as (url, _), Client(url, sleep=waits.append) as client:
        client.healthz()
    assert least <= waits[0] <= least * (1 + JITTER)


def test_an_error_page_of_a_gateway_is_an_error_in_words() -> None:
    broken = reply("502 Bad Gateway", b"<html>no</html>")
    saying = pytest.raises(EndpointError, match="answered with 502: <html>no")
    with answering(broken, broken) as (url, _), Client(url) as client, saying:
        client.recall()


def test_a_slow_endpoint_is_given_up() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        saying = pytest.raises(EndpointError, match="was not answered")
        with Client(address, timeout_s=0.05) as client, saying:
            client.recall()


def test_nobody_there_is_said() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    saying = pytest.raises(EndpointError, match="/v1/healthz was not answered")
    with Client(f"http://127.0.0.1:{port}") as client, saying:
        client.healthz()

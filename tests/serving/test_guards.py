"""What stands before the application refuses cheaply and says why."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving import guards
from karma_ray.serving.app import build_app
from karma_ray.serving.service import Service
from tests import tiny_run


@pytest.fixture(scope="module")
def retriever(tmp_path_factory) -> Retriever:
    return Retriever.load(tiny_run.write_run(tmp_path_factory.mktemp("guards")))


@pytest.fixture(scope="module")
def client(retriever: Retriever) -> Iterator[TestClient]:
    with TestClient(build_app(Service(retriever), token="open sesame")) as found:
        found.headers["authorization"] = "Bearer open sesame"
        yield found


@pytest.mark.parametrize("given", [None, "open sesame", "Bearer wrong", "bearer open sesame", ""])
def test_without_the_token_only_the_health_is_told(client: TestClient, given: str | None) -> None:
    headers = {} if given is None else {"authorization": given}
    stranger = TestClient(client.app, headers=headers)
    for path in ("/v1/version", "/metrics", "/docs", "/openapi.json", "/nothing"):
        assert stranger.get(path).status_code == 401
    refused = stranger.post("/v1/recall", json={})
    assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    assert stranger.get("/v1/healthz").status_code == 200


def test_a_body_beyond_a_megabyte_is_refused_however_it_comes(client: TestClient) -> None:
    large = b"x" * (guards.MAX_BODY_BYTES + 1)
    assert client.post("/v1/recall", content=large).status_code == 413
    parts = (large[n : n + 50_000] for n in range(0, len(large), 50_000))
    assert client.post("/v1/recall", content=parts).status_code == 413
    fine = (part for part in (b'{"que', b'ry": "mug"}'))
    assert client.post("/v1/recall", content=fine).status_code == 200


def test_no_answer_names_what_runs_here(client: TestClient) -> None:
    for answer in (client.post("/v1/recall", content=b"\xff"), client.get("/nothing")):
        assert "Traceback" not in answer.text and "/karma_ray" not in answer.text
        assert "python" not in str(answer.headers).lower()


def test_a_busy_endpoint_refuses_at_once_and_still_tells_its_health(retriever: Retriever) -> None:
    service = Service(retriever, max_waiting=2)
    gate, entered = threading.Event(), threading.Event()
    answer = service.engine.answer

    def slow(calls):
        entered.set()
        gate.wait(30)
        return answer(calls)

    service.engine.answer = slow  # type: ignore[method-assign]
    with TestClient(build_app(service)) as client:
        threads = [threading.Thread(target=client.post, args=("/v1/recall",), kwargs={"json": {}})]
        threads[0].start()
        assert entered.wait(30)
        for _ in range(2):
            threads.append(
                threading.Thread(target=client.post, args=("/v1/recall",), kwargs={"json": {}})
            )
            threads[-1].start()
        while not service.is_full:
            pass
        refused = client.post("/v1/recall", json={})
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert client.get("/v1/healthz").status_code == 200
        assert "karma_ray_waiting 2.0" in client.get("/metrics").text
        gate.set()
        for thread in threads:
            thread.join(30)
        assert client.post("/v1/recall", json={}).status_code == 200

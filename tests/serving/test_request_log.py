"""Every answer is named, and the log says what happened without saying to whom."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from karma_ray.errors import InputError
from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving.app import build_app
from karma_ray.serving.request_log import CALLS, LogSettings, RequestLog
from karma_ray.serving.service import Service
from tests import tiny_run

USER, QUERY = "maria@example.org", "a very private wish"


@pytest.fixture(scope="module")
def retriever(tmp_path_factory) -> Retriever:
    return Retriever.load(tiny_run.write_run(tmp_path_factory.mktemp("log")))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def client_of(retriever: Retriever, path: Path, raw: bool = False, **options: Any) -> TestClient:
    return TestClient(build_app(Service(retriever), log=LogSettings(str(path), raw), **options))


def test_a_line_names_versions_arm_and_time_but_neither_user_nor_query(retriever, tmp_path) -> None:
    path = tmp_path / "requests.jsonl"
    with client_of(retriever, path) as client:
        body = {"user_id": USER, "query": QUERY, "history": [{"item_id": "i3", "query": QUERY}]}
        for call, more in (("recall", {}), ("score", {"item_ids": ["i1"]}),
                           ("features", {"item_ids": ["i1"]})):  # fmt: skip
            answer = client.post(f"/v1/{call}", json={**body, **more})
            assert answer.status_code == 200 and answer.headers["x-karma-arm"] == "main"
        client.post("/v1/events", json={"user_id": USER, "item_id": "i3", "query": QUERY})
        client.get("/v1/healthz")
        found = answer.json()
    text = path.read_text()
    assert USER not in text and QUERY not in text and "maria" not in text
    lines = lines_of(path)
    assert [line["path"] for line in lines] == [
        "/v1/recall", "/v1/score", "/v1/features", "/v1/events",
    ]  # fmt: skip
    for line in lines:
        assert (line["status"], line["arm"], line["batch_size"]) == (200, "main", 1)
        assert line["model_version"] == found["model_version"]
        assert line["index_version"] == found["index_version"]
        assert line["latency_ms"] > 0 and "query" not in line and "user_id" not in line
    assert len({line["user"] for line in lines}) == 1  # one user is one user
    assert len({line["request_id"] for line in lines}) == 4


def test_what_is_asked_for_is_written_as_it_is(retriever, tmp_path) -> None:
    path = tmp_path / "requests.jsonl"
    with client_of(retriever, path, raw=True) as client:
        client.post("/v1/recall", json={"user_id": USER, "query": "тапки\n"})
        client.post("/v1/recall", json={})
    first, second = lines_of(path)
    assert (first["user_id"], first["query"]) == (USER, "тапки\n")
    assert (second["user_id"], second["query"]) == (None, None) and "user" not in second


def test_an_id_that_the_caller_gives_comes_back_and_a_bad_one_does_not(retriever, tmp_path) -> None:
    path = tmp_path / "requests.jsonl"
    with client_of(retriever, path) as client:
        given = client.post("/v1/recall", json={}, headers={"x-request-id": "abc-1.2"})
        bad = client.post("/v1/recall", json={}, headers={"x-request-id": 'a"b {}'})
        none = client.post("/v1/recall", json={})
        other = client.get("/v1/healthz", headers={"x-request-id": "probe"})
    assert given.headers["x-request-id"] == "abc-1.2"
    assert len(bad.headers["x-request-id"]) == len(none.headers["x-request-id"]) == 32
    assert other.headers["x-request-id"] == "probe"
    assert [line["request_id"] for line in lines_of(path)] == [
        answer.headers["x-request-id"] for answer in (given, bad, none)
    ]


def test_refused_requests_have_a_line_and_are_counted(retriever, tmp_path) -> None:
    path = tmp_path / "requests.jsonl"
    with client_of(retriever, path, token="secret") as client:
        allowed = {"authorization": "Bearer secret"}
        client.post("/v1/recall", json={})
        client.post("/v1/recall", json={"k": 0}, headers=allowed)
        client.post("/v1/recall", content=b" " * 1_000_001, headers=allowed)
        text = client.get("/metrics", headers=allowed).text
    assert [line["status"] for line in lines_of(path)] == [401, 422, 413]
    for status in (401, 422, 413):
        count = f'karma_ray_requests_total{{arm="",path="/v1/recall",status="{status}"}} 1.0'
        assert count in text


def test_our_own_mistakes_are_counted_as_failures(retriever, monkeypatch) -> None:
    service = Service(retriever)

    def broken(_: object) -> list[object]:
        raise ZeroDivisionError

    monkeypatch.setattr(service.engine, "answer", broken)
    with TestClient(build_app(service), raise_server_exceptions=False) as client:
        assert client.post("/v1/recall", json={}).status_code == 500
        text = client.get("/metrics").text
    assert re.search(r'karma_ray_requests_total\{.*path="/v1/recall",status="500"\} 1\.0', text)
    assert 'status="200"' not in text


def test_every_call_but_probes_has_a_line(retriever, tmp_path) -> None:
    app = build_app(Service(retriever))
    assert {route.path for route in app.routes if "POST" in route.methods} - CALLS == {
        f"/page/{name}" for name in ("user", "pictures", "floors", "thought", "other")
    }
    path = tmp_path / "requests.jsonl"
    with client_of(retriever, path) as client:
        client.post("/v1/rank", json={"item_ids": ["i1"]})  # nothing ranks here
    assert [(line["path"], line["status"]) for line in lines_of(path)] == [("/v1/rank", 404)]


def test_the_screen_is_that_of_the_process_whatever_takes_its_place(retriever, capfd) -> None:
    with (
        redirect_stdout(io.StringIO()) as taken,
        client_of(retriever, Path("-")) as client,
    ):
        client.post("/v1/recall", json={})
    assert taken.getvalue() == ""
    assert json.loads(capfd.readouterr().out)["path"] == "/v1/recall"


def test_the_hash_of_a_user_depends_on_the_salt(tmp_path) -> None:
    settings = LogSettings(str(tmp_path / "requests.jsonl"))
    one, same, other = (RequestLog(settings, salt).hidden(USER) for salt in ("a", "a", "b"))
    assert one == same != other


def test_a_file_that_cannot_be_written_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match="--log-requests"):
        RequestLog(LogSettings(str(tmp_path / "no folder" / "requests.jsonl")), "")

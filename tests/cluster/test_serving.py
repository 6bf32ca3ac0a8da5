"""The endpoint behind real Ray Serve answers as the application does."""

from __future__ import annotations

import re
import shlex
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from karma_ray.cluster.serving import Replicas, serve_run
from karma_ray.errors import InputError, SkewError
from karma_ray.ranking.config import RankingConfig
from karma_ray.serving.app import build_app
from karma_ray.serving.host import Options, curl_example, serve_here
from karma_ray.serving.measures import SECONDS
from karma_ray.serving.process import free_port
from karma_ray.serving.service import Service
from tests import tiny_ranker, tiny_run
from tests.serving.test_app import BODY


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return tiny_run.write_run(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def client(run: str) -> Iterator[TestClient]:
    with TestClient(build_app(Service.load(run))) as found:
        yield found


def test_the_curl_example_is_a_valid_request_whatever_the_ids_hold(client) -> None:
    command = shlex.split(curl_example("http://h:1", ["i1", 'it\'s "7"']))
    assert command[command.index("POST") + 1] == "http://h:1/v1/recall"
    # what curl says of `-d` when nobody tells it better
    headers = {"content-type": "application/x-www-form-urlencoded"}
    body = command[command.index("-d") + 1]
    answer = client.post("/v1/recall", content=body.encode(), headers=headers)
    assert answer.json()["ignored_item_ids"] == ['it\'s "7"']


def test_what_cannot_be_served_is_said_before_anything_starts(run: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--port"):
        serve_run(run, port=70000)
    for text in ("0", "-1", "many", "3-2", "1-", "2-x", ""):
        with pytest.raises(InputError, match="--replicas"):
            Replicas.parse(text)
    assert (Replicas.parse("3"), Replicas.parse("1-4")) == (Replicas(3, 3), Replicas(1, 4))
    with pytest.raises(InputError, match="does not exist"):
        serve_run(str(tmp_path / "nothing"), port=free_port())
    with pytest.raises(InputError, match=r"--ranker: .* has no finished ranker"):
        serve_run(run, port=free_port(), options=Options(ranker=run))
    mixed, other = tiny_run.write_run(tmp_path / "a"), tiny_run.write_run(tmp_path / "b", seed=3)
    Path(mixed, "index").rename(tmp_path / "away")
    Path(other, "index").rename(Path(mixed, "index"))
    with pytest.raises(SkewError, match="index was made from bundle"):
        serve_run(mixed, port=free_port())


@pytest.mark.parametrize("serve", [serve_here, serve_run])
def test_a_port_that_somebody_holds_is_said_before_the_run_is_looked_at(serve, tmp_path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"--port: {port} is used by another program"):
            serve(str(tmp_path / "nothing"), "127.0.0.1", port)


@pytest.mark.ray
def test_ray_serve_answers_as_the_app_does_and_sheds_load(
    ray_cluster, run: str, client, monkeypatch
) -> None:
    from ray import serve

    root = Path(run).parent
    ranker = tiny_ranker.write_ranker(
        root, run, RankingConfig(family="simtier"), tiny_ranker.write_items(root)
    )
    monkeypatch.chdir(root)
    ready: list[str] = []
    try:
        url = serve_run(
            "run", port=free_port(), max_queued_requests=1, on_ready=ready.append,
            options=Options(compare="run", ranker=Path(ranker).name),
        )  # fmt: skip
        assert ready == [url]
        served = httpx.post(f"{url}/v1/recall", json=BODY, timeout=30)
        assert served.status_code == 200
        direct = client.post("/v1/recall", json=BODY).json()
        for ours, theirs in zip(served.json()["items"], direct["items"], strict=True):
            assert ours["item_id"] == theirs["item_id"] and ours["title"] == theirs["title"]
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
        refused = httpx.post(f"{url}/v1/recall", json={"k": 0}, timeout=30)
        assert refused.status_code == 422 and refused.json()["detail"][0]["loc"] == ["body", "k"]
        assert httpx.get(f"{url}/v1/healthz", timeout=30).json()["num_items"] == 40
        assert httpx.get(f"{url}/docs", timeout=30).status_code == 200
        asked = {"query": "red mug", "history": BODY["history"], "k": 5}
        ranked = httpx.post(f"{url}/v1/rank", json=asked, timeout=30).json()["items"]
        with TestClient(build_app(Service.load(run, ranker=ranker))) as here:
            expected = here.post("/v1/rank", json=asked).json()["items"]
        assert [item["item_id"] for item in ranked] == [item["item_id"] for item in expected]
        assert [i["ctr"] for i in ranked] == pytest.approx([i["ctr"] for i in expected], abs=1e-5)
        beside = httpx.post(f"{url}/page/other", json=BODY, timeout=30)
        assert beside.json()["items"] == served.json()["items"]

        def ask(_: int) -> httpx.Response:
            return httpx.post(f"{url}/v1/recall", json={**BODY, "k": 40}, timeout=60)

        with ThreadPoolExecutor(48) as pool:
            answers = list(pool.map(ask, range(96)))
        assert {a.status_code for a in answers} == {200, 503}
        assert all(a.headers["retry-after"] == "1" for a in answers if a.status_code == 503)
        assert ask(0).status_code == 200
    finally:
        serve.shutdown()


@pytest.fixture(scope="module")
def two_replicas(ray_cluster, run: str) -> Iterator[str]:
    from ray import serve

    try:
        yield serve_run(run, port=free_port(), replicas=Replicas(2, 2))
    finally:
        serve.shutdown()


@pytest.mark.ray
def test_all_replicas_know_a_click_that_one_of_them_was_told(two_replicas: str, client) -> None:
    clicks = [{"item_id": f"i{n}", "query": "lamp"} for n in (3, 21, 8, 9, 30, 31, 12, 2)]
    sent = client.post("/v1/recall", json={"query": "mug", "history": clicks}).json()["items"]
    told = [
        httpx.post(f"{two_replicas}/v1/events", json={"user_id": "ann", **click}, timeout=60).json()
        for click in clicks
    ]
    # Calls go to either replica at random.
    assert [answer["num_clicks"] for answer in told] == list(range(1, 9))
    for _ in range(8):
        body = {"query": "mug", "user_id": "ann"}
        found = httpx.post(f"{two_replicas}/v1/recall", json=body, timeout=60).json()["items"]
        assert [item["item_id"] for item in found] == [item["item_id"] for item in sent]


def of_the_node(name: str) -> list[tuple[dict[str, str], float]]:
    """Labels and values of a metric in what Ray tells of this node."""
    import ray

    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    found = re.findall(rf"^{name}\{{(.*)\}} (\S+)$", httpx.get(url, timeout=60).text, re.MULTILINE)
    return [(dict(re.findall(r'(\w+)="(.*?)"', labels)), float(value)) for labels, value in found]


@pytest.mark.ray
def test_ray_sums_what_all_replicas_count(two_replicas: str) -> None:
    asked = 24
    for _ in range(asked):
        body = {"query": "mug", "item_ids": ["i1"]}
        httpx.post(f"{two_replicas}/v1/score", json=body, timeout=60)

    def counted(name: str) -> list[tuple[dict[str, str], float]]:
        return [pair for pair in of_the_node(name) if pair[0].get("path") == "/v1/score"]

    until = time.monotonic() + 120
    while sum(value for _, value in counted("ray_karma_ray_requests_total")) < asked:
        assert time.monotonic() < until, of_the_node("ray_karma_ray_.*")
        time.sleep(0.5)
    found = counted("ray_karma_ray_requests_total")
    assert sum(value for _, value in found) == asked
    assert len({labels["replica"] for labels, _ in found}) == 2
    assert {(labels["status"], labels["arm"]) for labels, _ in found} == {("200", "main")}
    alone = httpx.get(f"{two_replicas}/metrics", timeout=60).text
    assert f'path="/v1/score",status="200"}} {asked}' not in alone
    times = counted("ray_karma_ray_request_seconds_bucket")
    assert sum(value for labels, value in times if labels["le"] == "+Inf") == asked
    assert {float(labels["le"]) for labels, _ in times} == {*SECONDS, float("inf")}
    assert len(of_the_node("ray_karma_ray_waiting")) == 2

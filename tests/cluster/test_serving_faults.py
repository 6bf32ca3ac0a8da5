"""A lost process of the endpoint costs time, never a wrong answer; what is counted is printed.

    pytest -s -m fault tests/cluster/test_serving_faults.py

prints the rows of the table in docs/operations.md: asked, repeated by the client, failed all the
same, mixed, wrong, and the longest time without an answer in seconds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from karma_ray.serving.process import free_port
from karma_ray.serving.publishing import publish, roll_back, wait_until_live
from tests import tiny_run
from tests.cluster.crowd import PATIENCE_S, Crowd, known_answers

ROOT = Path(__file__).resolve().parents[2]
REPLICA = "ServeReplica:karma_ray:retriever"
PROCESSES = {"replica": REPLICA, "controller": "ServeController", "proxy": "ProxyActor"}
ANSWERS_ON = {(1, "controller"), (1, "proxy"), (2, "controller"), (2, "replica")}
"""Replicas and kills that others survive. The only replica opens the port itself, and the proxy of
a machine is one process that opens the port for all its replicas: nothing answers while either is
being replaced."""
MOST_FAILED = 0.001
ENOUGH = 1000
"""Answers after a kill, so that a single failed request is too many."""
HELD_S = 0.05
"""Seconds between head and body of a request, so that some are always in flight."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return tiny_run.write_run(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Callable[..., tuple[str, subprocess.Popen]]]:
    started: list[subprocess.Popen] = []

    def start(source: str, *flags: str) -> tuple[str, subprocess.Popen]:
        port = free_port()
        command = [sys.executable, "jobs/serve.py", source, "--port", str(port), *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}
        log = (tmp_path / "log").open("w")
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        started.append(process)
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                if httpx.get(f"{url}/v1/healthz", timeout=5).status_code == 200:
                    return url, process
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        raise AssertionError((tmp_path / "log").read_text())

    yield start
    for process in started:
        process.terminate()
        try:
            process.wait(60)
        finally:
            subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)


def processes(session: int, name: str) -> list[int]:
    """Process ids of a session whose command holds `name`."""
    listed = subprocess.run(
        ["pgrep", "-s", str(session), "-f", name], capture_output=True, text=True, check=False
    )
    return [int(line) for line in listed.stdout.split()]


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_killed_process_costs_no_wrong_answer(endpoint, run: str, replicas: int) -> None:
    url, process = endpoint(run, "--replicas", str(replicas))
    with Crowd(url, known_answers(run)) as crowd:
        crowd.wait_for(200)
        for name, command in PROCESSES.items():
            crowd.counts()
            before = processes(process.pid, command)
            assert len(before) == (replicas if name == "replica" else 1)
            os.kill(before[0], signal.SIGKILL)
            crowd.wait_for(ENOUGH)
            wait_until_replaced(process.pid, command, before)
            found = crowd.counts()
            print(found.row(f"{name} of {replicas} killed"), *found.statuses)
            assert found.wrong == found.mixed == 0
            if (replicas, name) in ANSWERS_ON:
                assert found.failed < MOST_FAILED * found.asked


def wait_until_replaced(session: int, command: str, before: list[int]) -> None:
    until = time.monotonic() + PATIENCE_S
    while True:
        now = processes(session, command)
        if len(now) == len(before) and before[0] not in now:
            return
        assert time.monotonic() < until, f"{command} was not replaced"
        time.sleep(0.5)


@dataclass
class Held:
    """A request whose body follows its head after a while."""

    begun: float = 0.0
    """When the endpoint asked for the body; 0 if it never did."""
    ended: float = 0.0
    status: int | None = None

    def ask(self, url: str) -> None:
        """Send head and body, and read the answer; a lost connection has no status."""
        place, body = urlsplit(url), json.dumps({"query": "red mug", "k": 3}).encode()
        head = (
            f"POST /v1/recall HTTP/1.1\r\nhost: {place.netloc}\r\nexpect: 100-continue\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        address = place.hostname, place.port
        with suppress(OSError), socket.create_connection(address, timeout=60) as line:
            line.sendall(head.encode())
            said = line.recv(65536)
            if said.startswith(b"HTTP/1.1 100 "):
                self.begun = time.monotonic()
                time.sleep(HELD_S)
                line.sendall(body)
                said = line.recv(65536)
            if said:
                self.status = int(said.split()[1])
        self.ended = time.monotonic()


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("flags", ["--without-ray", "--replicas 1", "--replicas 2"])
def test_requests_begun_before_a_signal_are_answered(endpoint, run: str, flags: str) -> None:
    url, process = endpoint(run, *flags.split())
    requests: list[Held] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            requests.append(request := Held())
            request.ask(url)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + PATIENCE_S
    while sum(request.ended > 0 for request in requests) < 100 and time.monotonic() < until:
        time.sleep(0.02)
    at = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code = process.wait(60)
    stop.set()
    for thread in threads:
        thread.join(60)
    before = [request for request in requests if 0 < request.begun < at]
    in_flight = [request for request in before if request.ended > at]
    later = [request.status for request in requests if request.begun >= at or not request.begun]
    print(
        f"| SIGTERM, {flags} | {len(before)} before, {len(in_flight)} in flight | "
        f"{sum(r.status != 200 for r in before)} failed | later {later.count(200)} answered |"
    )
    assert code == 0 and in_flight
    assert {request.status for request in before} == {200}


@pytest.mark.slow
@pytest.mark.fault
def test_a_publication_under_load_fails_and_mixes_no_request(endpoint, run, tmp_path) -> None:
    live, other = str(tmp_path / "live"), tiny_run.write_run(tmp_path / "other", seed=3)
    publish(live, run, now="now", fresh=lambda: "a")
    url, _ = endpoint(live, "--replicas", "2")
    known = known_answers(run, other)
    with Crowd(url, known, num_retries=0) as crowd:
        crowd.wait_for(200)
        published, _ = publish(live, other, now="later", fresh=lambda: "b", force=True)
        wait_until_live(url, published, PATIENCE_S)
        crowd.wait_for(200)
        wait_until_live(url, roll_back(live), PATIENCE_S)
        crowd.wait_for(200)
    found = crowd.counts()
    print(found.row("a publication and a rollback, 2 replicas"), *found.by_version.values())
    assert found.failed == found.mixed == found.wrong == 0
    assert set(found.by_version) == set(known)


@pytest.mark.slow
@pytest.mark.fault
def test_replicas_are_added_under_load_and_removed_after_it(endpoint, run: str) -> None:
    url, process = endpoint(run, "--replicas", "1-2")
    assert len(processes(process.pid, REPLICA)) == 1
    with Crowd(url, known_answers(run), clients=40) as crowd:
        until = time.monotonic() + 120
        while len(processes(process.pid, REPLICA)) < 2 and time.monotonic() < until:
            time.sleep(0.5)
        grown = len(processes(process.pid, REPLICA))
    assert grown == 2
    until = time.monotonic() + PATIENCE_S
    while len(processes(process.pid, REPLICA)) > 1 and time.monotonic() < until:
        time.sleep(1)
    assert len(processes(process.pid, REPLICA)) == 1
    found = crowd.counts()
    assert found.wrong == found.mixed == 0


@pytest.mark.slow
@pytest.mark.fault
def test_a_lost_store_of_clicks_begins_empty_and_costs_others_nothing(endpoint, run: str) -> None:
    url, process = endpoint(run, "--replicas", "2")
    click = {"user_id": "ann", "item_id": "i3"}
    with httpx.Client(base_url=url, timeout=60) as client:
        told = [client.post("/v1/events", json=click).json()["num_clicks"] for _ in range(3)]
        assert told == [1, 2, 3]
        with Crowd(url, known_answers(run), num_retries=0) as crowd:  # they send their history
            crowd.wait_for(20)
            (store,) = processes(process.pid, "ServeReplica:karma_ray:clicks")
            os.kill(store, signal.SIGKILL)
            until, answer = time.monotonic() + PATIENCE_S, None
            while time.monotonic() < until:
                answer = client.post("/v1/events", json=click)
                if answer.status_code == 200:
                    break
                assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            assert answer is not None and answer.json()["num_clicks"] == 1
            crowd.wait_for(20)
        found = crowd.counts()
        print(found.row("store of clicks killed"))
        assert found.wrong == found.mixed == found.failed == 0

"""A lost process of the endpoint costs time, never a wrong answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from karma_ray.retrieval.requests import HistoryItem
from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving.process import free_port
from tests import tiny_run

ROOT = Path(__file__).resolve().parents[2]
REPLICA = "ServeReplica:karma_ray:retriever"
PATIENCE_S = 150.0
"""How long a client goes on asking for one answer: a lost replica loads its model again."""


class Crowd:
    """Clients that ask without pause, and compare each answer with what it must be."""

    def __init__(self, url: str, expected: list[tuple[dict[str, Any], list[str]]]) -> None:
        self.url, self.expected = url, expected
        self.right = self.wrong = self.given_up = self.retried = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(4)]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S + 30)

    def wait_for(self, more: int) -> None:
        """Return when `more` further answers have come."""
        until, limit = self.right + more, time.monotonic() + 2 * PATIENCE_S
        while self.right < until and time.monotonic() < limit:
            time.sleep(0.05)
        assert self.right >= until, "the endpoint did not come back"

    def _ask(self, place: int) -> None:
        with httpx.Client(timeout=30) as client:
            while not self._stop.is_set():
                place = (place + 1) % len(self.expected)
                body, ids = self.expected[place]
                found = self._answer(client, body)
                if found is None:
                    self.given_up += 1
                elif found == ids:
                    self.right += 1
                else:
                    self.wrong += 1

    def _answer(self, client: httpx.Client, body: dict[str, Any]) -> list[str] | None:
        """Ask again after a lost connection or an error of the server, until patience ends."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            try:
                answer = client.post(f"{self.url}/v1/recall", json=body)
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.status_code == 200:
                return [item["item_id"] for item in answer.json()["items"]]
            if answer is not None:
                # Refused or interrupted, not answered otherwise.
                assert answer.status_code in (500, 502, 503, 404), answer.text
            self.retried += 1
            time.sleep(0.2)
        return None


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return tiny_run.write_run(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def expected(run: str) -> list[tuple[dict[str, Any], list[str]]]:
    retriever = Retriever.load(run)
    found = []
    for n in range(20):
        history = [HistoryItem(f"i{(7 * n + m) % 40}", "lamp") for m in range(n % 5)]
        answer = retriever.recall("red mug", history, 3 + n % 4)
        clicks = [{"item_id": item.item_id, "query": item.query} for item in history]
        body = {"query": "red mug", "history": clicks, "k": 3 + n % 4}
        found.append((body, [item.item_id for item in answer.items]))
    return found


@pytest.fixture
def endpoint(run: str, tmp_path: Path) -> Iterator[Callable[..., tuple[str, subprocess.Popen]]]:
    started: list[subprocess.Popen] = []

    def start(*flags: str) -> tuple[str, subprocess.Popen]:
        port = free_port()
        command = [sys.executable, "jobs/serve.py", run, "--port", str(port), *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}
        log = (tmp_path / "log").open("w")
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        started.append(process)
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 240
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
def test_killed_processes_cost_no_answer_and_a_signal_drains(endpoint, expected) -> None:
    url, process = endpoint()
    with Crowd(url, expected) as crowd:
        crowd.wait_for(50)
        for name in ("ServeReplica", "ServeController", "ProxyActor"):
            found = processes(process.pid, name)
            assert found, f"no process named {name}"
            for pid in found:
                os.kill(pid, signal.SIGKILL)
            crowd.wait_for(100)
    assert crowd.wrong == 0 and crowd.given_up == 0 and crowd.retried > 0
    # Requests in flight when the endpoint is asked to end are answered.
    answers: list[int] = []

    def ask() -> None:
        for body, _ in expected:
            answers.append(httpx.post(f"{url}/v1/recall", json=body, timeout=30).status_code)

    ask()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert set(answers) == {200}


@pytest.mark.slow
@pytest.mark.fault
def test_replicas_are_added_under_load_and_removed_after_it(endpoint, expected) -> None:
    url, process = endpoint("--replicas", "1-2")
    assert len(processes(process.pid, REPLICA)) == 1
    crowds = [Crowd(url, expected) for _ in range(10)]  # forty clients
    for crowd in crowds:
        crowd.__enter__()
    until = time.monotonic() + 120
    while len(processes(process.pid, REPLICA)) < 2 and time.monotonic() < until:
        time.sleep(0.5)
    grown = len(processes(process.pid, REPLICA))
    for crowd in crowds:
        crowd.__exit__()
    assert grown == 2
    until = time.monotonic() + 240
    while len(processes(process.pid, REPLICA)) > 1 and time.monotonic() < until:
        time.sleep(1)
    assert len(processes(process.pid, REPLICA)) == 1
    assert sum(crowd.wrong for crowd in crowds) == 0


@pytest.mark.slow
@pytest.mark.fault
def test_a_lost_store_of_clicks_begins_empty_and_costs_others_nothing(endpoint, expected) -> None:
    url, process = endpoint("--replicas", "2")
    click = {"user_id": "ann", "item_id": "i3"}
    with httpx.Client(base_url=url, timeout=60) as client:
        told = [client.post("/v1/events", json=click).json()["num_clicks"] for _ in range(3)]
        assert told == [1, 2, 3]
        with Crowd(url, expected) as crowd:  # they send their history
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
        assert crowd.wrong == crowd.given_up == crowd.retried == 0

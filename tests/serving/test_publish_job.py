"""The commands: an endpoint under load follows what is published, and refusals say why."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pyarrow as pa
import pytest

from karma_ray.artifacts import join, read_manifest, write_table
from karma_ray.data.schema import ITEMS
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.serving.live import read_live
from tests import tiny_run

ROOT = Path(__file__).resolve().parents[2]
BODY = {"query": "red mug", "history": [{"item_id": "i3"}], "k": 41}


def job(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    found = []
    for seed in range(2):
        root = tmp_path / f"root{seed}"
        root.mkdir()
        tiny_run.write_data(root)
        found.append(tiny_run.write_run(root, seed))
    return found


def test_what_cannot_be_published_is_named(runs: list[str], tmp_path: Path, capsys) -> None:
    publish = runpy.run_path(str(ROOT / "jobs" / "publish.py"))["main"]
    live = str(tmp_path / "live")
    for arguments, said in (
        ([], "--to is needed"),
        (["--to", live], "RUN is needed"),
        ([runs[0], "--to", "http://127.0.0.1:8000"], "--endpoint"),
        (["--rollback", "--to", live], "live.json"),
        (["--rollback", runs[0], "--to", live], "takes no RUN"),
        ([runs[0], "--to", runs[1]], "is a run"),
        ([str(tmp_path / "nothing"), "--to", live], "does not exist"),
    ):
        with pytest.raises(InputError, match=said):
            publish(arguments)
    publish([runs[0]])
    beside = str(Path(runs[0]).parent / "live")
    assert read_live(beside).arms[0].run == runs[0]
    with pytest.raises(KarmaRayError, match=r"metrics\.json.*--force"):
        publish([runs[1], "--to", beside])
    publish([runs[1], "--to", beside, "--arm", "new", "--share", "20", "--force"])
    assert "main: 80 % of users" in capsys.readouterr().out
    publish(["--to", beside, "--arm", "new", "--share", "0"])
    assert len(read_live(beside).arms) == 1
    with pytest.raises(KarmaRayError, match="goes on answering"):
        publish([runs[0], "--to", beside, "--endpoint", "http://127.0.0.1:9", "--within", "0"])


@pytest.fixture
def endpoint(runs: list[str], tmp_path: Path) -> Iterator[str]:
    live = str(tmp_path / "live")
    assert job("publish", runs[0], "--to", live).returncode == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "serve.py"), live, "--without-ray", "--port",
         str(port), "--log-requests", str(tmp_path / "requests.jsonl")],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and "ready" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


class Load:
    """Threads that ask all the time; every answer is kept."""

    def __init__(self, url: str, count: int = 4) -> None:
        self.statuses: list[int] = []
        self.versions: list[tuple[str, str]] = []
        self.items: dict[tuple[str, str], set[tuple[str, ...]]] = {}
        self._stop, self._url = threading.Event(), url
        self._threads = [threading.Thread(target=self._ask) for _ in range(count)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(f"{self._url}/v1/recall", json=BODY)
                except httpx.HTTPError:
                    self.statuses.append(0)
                    continue
                self.statuses.append(answer.status_code)
                if answer.status_code == 200:
                    found = answer.json()
                    version = found["model_version"], found["index_version"]
                    self.versions.append(version)
                    ids = tuple(sorted(item["item_id"] for item in found["items"]))
                    self.items.setdefault(version, set()).add(ids)


@pytest.mark.slow
def test_an_endpoint_under_load_follows_every_command(runs, endpoint: str, tmp_path: Path) -> None:
    live = str(tmp_path / "live")
    to = ["--to", live, "--endpoint", endpoint, "--within", "120"]
    with Load(endpoint) as load:
        assert job("publish", runs[1], *to).returncode == 1  # nobody measured these
        assert job("publish", runs[1], *to, "--force").returncode == 0
        assert job("publish", "--rollback", *to).returncode == 0
        rows = [*tiny_run.items_table().to_pylist()[1:], {"item_id": "new", "title": "red mug"}]
        write_table(pa.Table.from_pylist(rows, schema=ITEMS), join(runs[0], "../data/items"))
        embedded = job("embed", runs[0], "--new")
        assert embedded.returncode == 0, embedded.stderr
        assert job("publish", runs[0], *to).returncode == 0
    assert set(load.statuses) == {200}
    bundles = [read_manifest(join(run, "bundle"))["content_hash"] for run in runs]
    indexes = [read_manifest(join(run, "index"))["content_hash"] for run in runs]
    delta = read_manifest(join(runs[0], "delta-2"))["content_hash"]
    updated = bundles[0], f"{indexes[0]}+{delta}"
    assert set(load.versions) == {*zip(bundles, indexes, strict=True), updated}
    assert load.versions[-1] == updated
    old = tuple(sorted(f"i{n}" for n in range(40)))
    new = tuple(sorted([*(f"i{n}" for n in range(1, 40)), "new"]))
    assert load.items == {
        (bundles[0], indexes[0]): {old}, (bundles[1], indexes[1]): {old}, updated: {new},
    }  # fmt: skip
    lines = (tmp_path / "requests.jsonl").read_text().splitlines()
    assert len(lines) == len(load.statuses)

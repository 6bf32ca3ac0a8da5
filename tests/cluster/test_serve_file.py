"""`serve run deploy/serve.yaml` answers, follows what is published and gives up slow clients."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from karma_ray.serving.process import free_port
from karma_ray.serving.publishing import publish, wait_until_live
from tests import tiny_run
from tests.serving.test_slow_clients import said_to_half_a_head

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 240.0


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The URL of what `serve run` starts, and the live folder that it serves."""
    live, port = str(tmp_path / "live"), free_port()
    publish(live, tiny_run.write_run(tmp_path / "a"), now="now", fresh=lambda: "a")
    text = (ROOT / "deploy/serve.yaml").read_text()
    for old, new in (
        ("s3://BUCKET/runs/live", live), ("num_replicas: 1", 'log_requests: "-", num_replicas: 2'),
        ("host: 0.0.0.0, port: 8000", f"host: 127.0.0.1, port: {port}"),
    ):  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "serve.yaml").write_text(text)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0",
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    program = str(Path(sys.executable).parent / "serve")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [program, "run", str(tmp_path / "serve.yaml")], cwd=ROOT, env=environment,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE_S
    try:
        while True:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            try:
                if httpx.get(f"{url}/v1/healthz", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        yield url, live
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)


@pytest.mark.slow
def test_the_file_is_served_as_documented(endpoint: tuple[str, str], tmp_path: Path) -> None:
    url, live = endpoint
    screen = tmp_path / "log"  # what replicas print reaches the screen of `serve run`
    found = httpx.post(f"{url}/v1/recall", json={"query": "red mug", "k": 3}, timeout=60)
    assert len(found.json()["items"]) == 3
    until = time.monotonic() + PATIENCE_S
    while not (lines := re.findall(r'\{"time": .*?"path": "/v1/recall".*?\}', screen.read_text())):
        assert time.monotonic() < until, screen.read_text()
        time.sleep(0.5)
    line = json.loads(lines[0])
    assert (line["status"], line["arm"]) == (200, "main") and line["latency_ms"] > 0
    assert line["model_version"] == found.json()["model_version"]
    told = [
        httpx.post(f"{url}/v1/events", json={"user_id": "u", "item_id": f"i{n}"}, timeout=60).json()
        for n in range(8)
    ]
    assert [answer["num_clicks"] for answer in told] == list(range(1, 9))
    other = tiny_run.write_run(tmp_path / "b", seed=3)
    published, _ = publish(live, other, now="now", fresh=lambda: "b", force=True)
    wait_until_live(url, published, PATIENCE_S)
    assert said_to_half_a_head(url).startswith(b"HTTP/1.1 408")

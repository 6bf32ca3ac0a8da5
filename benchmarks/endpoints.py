"""Endpoints of a run behind several hosts, the requests they are sent, and what they count."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from karma_ray.artifacts import RunFolder, read_table

ROOT = Path(__file__).resolve().parents[1]
QUERIES = ("", "red", "blue", "large", "small", "warm", "light", "new")
QUERIES_OF_A_USER = 4
HEALTHZ_RATE = 50
"""How often a second `/v1/healthz` is asked beside a load."""
AHEAD_S = 1.0
"""By how much that load begins earlier and ends later."""
SINGLE = """
import sys, uvicorn
from karma_ray.serving import service
from karma_ray.serving.app import build_app
service.MAX_SLOTS = 0
found = service.Service.load(sys.argv[1], cache_bytes=0)
uvicorn.run(build_app(found), port=int(sys.argv[2]), log_level="warning", access_log=False)
"""

History = list[dict[str, str]]


def item_ids(run: str) -> list[str]:
    """Return the ids of the run's index."""
    source = RunFolder(run).path("index", "item_ids.parquet")
    ids: list[str] = read_table(source, columns=["item_id"]).column("item_id").to_pylist()
    return ids


def histories(run: str, length: int, users: int, seed: int = 0) -> list[History]:
    """Return random clicks of `users`."""
    ids, draw = item_ids(run), random.Random(seed)
    return [
        [{"item_id": draw.choice(ids), "query": draw.choice(QUERIES)} for _ in range(length)]
        for _ in range(users)
    ]


def bodies(of: Sequence[History], k: int, queries: int = QUERIES_OF_A_USER) -> list[str]:
    """Return requests of users with these histories, each with several queries."""
    return [
        json.dumps({"query": query, "history": clicks, "k": k})
        for clicks in of
        for query in QUERIES[:queries]
    ]


def store_clicks(url: str, of: Sequence[History], k: int) -> list[str]:
    """Tell an endpoint the clicks of users; returns requests that name them and send no history."""
    with httpx.Client(base_url=url, timeout=60) as client:
        for user, clicks in enumerate(of):
            for click in clicks:
                told = client.post("/v1/events", json={"user_id": f"{len(clicks)}/{user}", **click})
                told.raise_for_status()
    return [
        json.dumps({"query": query, "user_id": f"{len(clicks)}/{user}", "k": k})
        for user, clicks in enumerate(of)
        for query in QUERIES[:QUERIES_OF_A_USER]
    ]


@contextmanager
def endpoint(host: str, run: str) -> Iterator[str]:
    """Start a host; yields its URL, and stops it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    served = ["jobs/serve.py", run, "--port", port]
    command = {
        "single": ["-c", SINGLE, run, port],
        "uvicorn": [*served, "--without-ray"],
        "half": [*served, "--without-ray", "--precision", "bfloat16"],
        "serve": served,
        "serve2": [*served, "--replicas", "2"],
    }[host]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                httpx.get(f"{url}/v1/healthz", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                if process.poll() is not None:
                    raise SystemExit(f"{host} ended with {process.returncode}") from None
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def load(url: str, requests: str, seconds: float, *options: str) -> dict[str, Any]:
    """Send requests for so long from another process; returns what it printed."""
    return _said(_sending(url, requests, seconds, *options))


def healthz_under_load(url: str, requests: str, seconds: float, *options: str) -> dict[str, Any]:
    """Ask `/v1/healthz` from a third process while another sends requests; returns both."""
    sending = _sending(url, requests, seconds + 2 * AHEAD_S, *options)
    time.sleep(AHEAD_S)
    healthz = _said(_sending(url, "/v1/healthz", seconds, "--rate", str(HEALTHZ_RATE)))
    return {"healthz": healthz, **_said(sending)}


def _sending(url: str, requests: str, seconds: float, *options: str) -> subprocess.Popen[bytes]:
    program = [sys.executable, str(ROOT / "benchmarks/load.py"), url, requests]
    return subprocess.Popen([*program, "--seconds", str(seconds), *options], stdout=subprocess.PIPE)


def _said(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the load ended with {process.returncode}")
    found: dict[str, Any] = json.loads(said)
    return found


def stored(url: str) -> dict[str, float]:
    """Return how many histories were found stored whole, in part and not at all."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return {
        name: float(value)
        for name, value in re.findall(r'karma_ray_histories\{stored="(\w+)"\} (\S+)', text)
    }

"""The endpoint of a finished run under load, behind several hosts side by side.

    python benchmarks/serve.py RUN [--hosts uvicorn,serve] [--clients 1,8,16] [--history 0,20,50]
    python benchmarks/serve.py RUN --rates 100,200,400

Hosts: `single` (uvicorn, one request at a time and nothing stored), `uvicorn` (one process with
batches and stored histories: `jobs/serve.py RUN --without-ray`), `serve` (Ray Serve:
`jobs/serve.py RUN`). Every round asks all hosts in turn; printed are medians over the rounds, as
JSON lines: requests per second, latencies in ms, the ratio to `uvicorn`, and the share of histories
that were found stored. With `--rates` requests are due at fixed times instead (an open loop), and a
latency counts from then. Load comes from a process of its own (benchmarks/load.py), on the same
machine, and the item ids from the run's index.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from karma_ray import cli
from karma_ray.artifacts import RunFolder, read_table

QUERIES = ("", "red", "blue", "large", "small", "warm", "light", "new")
SINGLE = """
import sys, uvicorn
from karma_ray.serving import service
from karma_ray.serving.app import build_app
service.MAX_SLOTS = 0
found = service.Service.load(sys.argv[1], cache_bytes=0)
uvicorn.run(build_app(found), port=int(sys.argv[2]), log_level="warning", access_log=False)
"""


def bodies(run: str, history: int, users: int, k: int, seed: int = 0) -> list[str]:
    """Return requests of `users` with random histories, each with several queries."""
    source = RunFolder(run).path("index", "item_ids.parquet")
    ids = read_table(source, columns=["item_id"]).column("item_id").to_pylist()
    draw = random.Random(seed)
    found = []
    for _ in range(users):
        clicks = [
            {"item_id": draw.choice(ids), "query": draw.choice(QUERIES)} for _ in range(history)
        ]
        for query in QUERIES[:4]:
            found.append(json.dumps({"query": query, "history": clicks, "k": k}))
    return found


@contextmanager
def endpoint(host: str, run: str) -> Iterator[str]:
    """Start a host; yields its URL, and stops it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = {
        "single": ["-c", SINGLE, run, port],
        "uvicorn": ["jobs/serve.py", run, "--port", port, "--without-ray"],
        "serve": ["jobs/serve.py", run, "--port", port],
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


def load(url: str, requests: str, *options: str) -> dict:
    """Send requests from another process; returns what it printed."""
    command = [sys.executable, str(ROOT / "benchmarks/load.py"), url, requests, *options]
    found: dict = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def stored(url: str) -> dict[str, float]:
    """Return how many histories were found stored whole, in part and not at all."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return {
        name: float(value)
        for name, value in re.findall(r'karma_ray_histories\{stored="(\w+)"\} (\S+)', text)
    }


def measure(
    urls: dict[str, str], requests: str, given: argparse.Namespace, name: str, value: float
) -> None:
    """Ask all hosts in turn, with so many `clients` or at this `rate`, and print the medians."""
    rounds: dict[str, list[dict]] = {host: [] for host in urls}
    before = {host: stored(url) for host, url in urls.items()}
    for _ in range(given.rounds):
        for host, url in urls.items():
            options = [f"--{name}", str(value), "--seconds", str(given.seconds)]
            rounds[host].append(load(url, requests, *options))
    middle = {h: statistics.median(r["per_second"] for r in found) for h, found in rounds.items()}
    for host, found in rounds.items():
        rates = [r["per_second"] for r in found]
        hits = {n: v - before[host].get(n, 0) for n, v in stored(urls[host]).items()}
        line = {
            "host": host, name: value, "history": given.current,
            "per_second": middle[host], "spread": [min(rates), max(rates)],
            "to_uvicorn": round(middle[host] / middle.get("uvicorn", math.nan), 3),
            **{n: statistics.median(r[n] for r in found) for n in ("p50_ms", "p99_ms", "max_ms")},
            "stored": round(hits.get("whole", 0) / max(1.0, sum(hits.values())), 3),
            "failed": sum(n for r in found for s, n in r["statuses"].items() if s != "200"),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


def main() -> None:
    """Start the hosts, and print a line per host, number of clients and length of history."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("run", metavar="RUN")
    flags.add_argument("--hosts", default="single,uvicorn,serve")
    flags.add_argument("--clients", default="1,8,16")
    flags.add_argument("--rates", default="", help="requests per second, instead of --clients")
    flags.add_argument("--history", default="0,20,50")
    flags.add_argument("--users", type=int, default=200, help="distinct histories")
    flags.add_argument("--k", type=int, default=50)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--seconds", type=float, default=4.0)
    given = flags.parse_args()
    run = str(Path(given.run).resolve())
    with ExitStack() as stack:
        urls = {host: stack.enter_context(endpoint(host, run)) for host in given.hosts.split(",")}
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for history in map(int, given.history.split(",")):
            requests = Path(folder, f"{history}.jsonl")
            requests.write_text("\n".join(bodies(run, history, given.users, given.k)))
            given.current = history
            if given.rates:
                for rate in map(float, given.rates.split(",")):
                    measure(urls, str(requests), given, "rate", rate)
                continue
            for clients in map(int, given.clients.split(",")):
                measure(urls, str(requests), given, "clients", clients)


if __name__ == "__main__":
    main()

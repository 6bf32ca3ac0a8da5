"""The endpoint of a finished run under load, behind several hosts side by side.

    python benchmarks/serve.py RUN [--hosts uvicorn,serve] [--against RUN] [--quick]

Hosts: `single` (uvicorn, one request at a time and nothing stored), `uvicorn` (one process with
batches and stored histories: `jobs/serve.py RUN --without-ray`), `half` (the same with `--precision
bfloat16`), `serve` (Ray Serve: `jobs/serve.py RUN`), and with `--against` another run behind
`uvicorn`. Every round asks all hosts in turn; printed are medians over the rounds, as JSON lines:
requests per second, latencies in ms, the ratio to `uvicorn`, and the share of histories that were
found stored. Four parts:

- `--clients`: so many clients, each sending its next request when it has an answer;
- `--lengths`: one client, histories of so many clicks;
- `--rates`: requests due at fixed times (an open loop); a latency counts from then;
- overload: ten times as many requests as the most clients got answered, or what one process can
  send; latencies are those of accepted requests.

An empty list leaves a part out. The last line has the headline figures. Load comes from a process
of its own (benchmarks/load.py), on the same machine, and the item ids from the run's index.
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
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from karma_ray import cli
from karma_ray.artifacts import RunFolder, read_table

QUERIES = ("", "red", "blue", "large", "small", "warm", "light", "new")
LATENCIES = ("p50_ms", "p99_ms", "max_ms")
P99_MS = 20.0
MOST_SENT = 2500.0
"""Requests a second that the load generator can send beside an endpoint on two cores."""
Line = dict[str, Any]
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
        "half": [
            "jobs/serve.py", run, "--port", port, "--without-ray", "--precision", "bfloat16",
        ],
    }[host]  # fmt: skip
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
    urls: dict[str, str], requests: str, given: argparse.Namespace, part: str, value: float
) -> dict[str, Line]:
    """Ask all hosts in turn, with so many clients or at this rate, and print the medians."""
    option = "clients" if part in ("clients", "lengths") else "rate"
    load_of = 1 if part == "lengths" else value
    rounds: dict[str, list[dict]] = {host: [] for host in urls}
    before = {host: stored(url) for host, url in urls.items()}
    for _ in range(given.rounds):
        for host, url in urls.items():
            options = [f"--{option}", str(load_of), "--seconds", str(given.seconds)]
            rounds[host].append(load(url, requests, *options))
    middle = {h: statistics.median(r["per_second"] for r in found) for h, found in rounds.items()}
    first = middle.get("uvicorn")
    lines = {}
    for host, found in rounds.items():
        rates = [r["per_second"] for r in found]
        hits = {n: v - before[host].get(n, 0) for n, v in stored(urls[host]).items()}
        statuses: Counter[str] = Counter()
        for r in found:
            statuses.update(r["statuses"])
        lines[host] = {
            "part": part, "host": host, option: load_of, "history": given.current,
            "per_second": middle[host], "spread": [min(rates), max(rates)],
            "to_uvicorn": round(middle[host] / first, 3) if first else None,
            **{n: statistics.median(r.get(n, math.inf) for r in found) for n in LATENCIES},
            "stored": round(hits.get("whole", 0) / max(1.0, sum(hits.values())), 3),
            "refused": statuses.pop("503", 0),
            "failed": statuses.total() - statuses["200"],
        }  # fmt: skip
        print(json.dumps(lines[host]), flush=True)
    return lines


def headline(lines: list[Line], against: str | None) -> Line:
    """Return the figures by which runs of this benchmark are compared.

    `throughput_over_uvicorn` is of Ray Serve at the most clients and `added_p50_ms` at one client,
    both for the history that is worst. `latency_200_over_1_history` is of the longest and the
    shortest of `--lengths`, `karma_over_action_only` of RUN and the run of `--against`.
    `requests_per_s` is the highest rate whose p99 stayed below 20 ms.
    """

    def of(part: str, host: str, **fields: float) -> list[Line]:
        return [
            line
            for line in lines
            if (line["part"], line["host"]) == (part, host)
            and all(line.get(name) == value for name, value in fields.items())
        ]

    found: Line = {}
    most = max((line["clients"] for line in lines if line["part"] == "clients"), default=0)
    if ratios := [line["to_uvicorn"] for line in of("clients", "serve", clients=most)]:
        found["throughput_over_uvicorn"] = min(ratios)
    alone = of("clients", "uvicorn", clients=1)
    pairs = zip(of("clients", "serve", clients=1), alone, strict=False)
    if added := [serve["p50_ms"] - other["p50_ms"] for serve, other in pairs]:
        found["added_p50_ms"] = round(max(added), 2)
    lengths = sorted(of("lengths", "uvicorn"), key=lambda line: line["history"])
    if lengths:
        ratio = lengths[-1]["p50_ms"] / lengths[0]["p50_ms"]
        found[f"latency_{lengths[-1]['history']}_over_{lengths[0]['history']}_history"] = round(
            ratio, 3
        )
    pairs = zip(alone, of("clients", "against", clients=1), strict=False)
    if against and (ratios := [ours["p50_ms"] / theirs["p50_ms"] for ours, theirs in pairs]):
        found["karma_over_action_only"] = round(statistics.median(ratios), 3)
    for host in dict.fromkeys(line["host"] for line in lines if line["part"] == "rates"):
        held = [line for line in of("rates", host) if line["p99_ms"] < P99_MS]
        best = max(held, key=lambda line: line["rate"], default=None)
        end = "" if host == "uvicorn" else f"_{host}"
        found[f"requests_per_s{end}"] = best["per_second"] if best else 0.0
        found[f"p99_ms{end}"] = best["p99_ms"] if best else None
    return found


def numbers(text: str) -> list[int]:
    """Return the numbers of a list with commas."""
    return [int(number) for number in text.split(",") if number]


def parts(urls: dict[str, str], folder: str, run: str, given: argparse.Namespace) -> list[Line]:
    """Measure all parts; returns the printed lines."""
    lines: list[Line] = []

    def requests_of(history: int) -> str:
        given.current = history
        path = Path(folder, f"{history}.jsonl")
        if not path.exists():
            path.write_text("\n".join(bodies(run, history, given.users, given.k)))
        return str(path)

    def keep(found: dict[str, Line]) -> dict[str, Line]:
        lines.extend(found.values())
        return found

    hosts = {name: url for name, url in urls.items() if name != "against"}
    for history in numbers(given.history):
        requests = requests_of(history)
        full: dict[str, Line] = {}
        for clients in numbers(given.clients):
            full = keep(measure(urls, requests, given, "clients", clients))
        for rate in numbers(given.rates):
            keep(measure(hosts, requests, given, "rates", rate))
        for host in hosts if given.overload and full else ():
            offered = min(MOST_SENT, 10 * full[host]["per_second"])
            keep(measure({host: urls[host]}, requests, given, "overload", round(offered)))
    for history in numbers(given.lengths):
        keep(measure(hosts, requests_of(history), given, "lengths", history))
    return lines


def main() -> None:
    """Start the hosts, and print a line per host, number of clients and length of history."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("run", metavar="RUN")
    flags.add_argument("--hosts", default="single,uvicorn,serve")
    flags.add_argument("--against", metavar="RUN", help="another run, e.g. of action_only")
    flags.add_argument("--clients", default="1,8,16")
    flags.add_argument("--lengths", default="1,2,5,10,20,50,100,200")
    flags.add_argument("--rates", default="100,200,400,800", help="requests per second")
    flags.add_argument("--history", default="0,20,50")
    flags.add_argument("--users", type=int, default=200, help="distinct histories")
    flags.add_argument("--k", type=int, default=50)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--seconds", type=float, default=4.0)
    flags.add_argument("--overload", action=argparse.BooleanOptionalAction, default=True)
    flags.add_argument("--quick", action="store_true", help="fewer points, about three minutes")
    given = flags.parse_args()
    if given.quick:
        given.hosts, given.clients, given.lengths = "uvicorn,serve", "1,16", "1,200"
        given.history, given.rates, given.rounds, given.seconds = "0,50", "200,800", 2, 2.0
    run = str(Path(given.run).resolve())
    with ExitStack() as stack:
        urls = {host: stack.enter_context(endpoint(host, run)) for host in given.hosts.split(",")}
        if given.against:
            other = str(Path(given.against).resolve())
            urls["against"] = stack.enter_context(endpoint("uvicorn", other))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        lines = parts(urls, folder, run, given)
    print(json.dumps(headline(lines, given.against)), flush=True)


if __name__ == "__main__":
    main()

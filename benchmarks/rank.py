"""Ranking with a request's side computed once (MaRI), beside the plain model; and CTR training.

    python benchmarks/rank.py [RUN --ranker RUN2] [--quick]

RUN2 is a finished run of ctr_simtier with the vectors of RUN; without them both are made of a small
toy shop, with a few steps each, since latency does not depend on what was learnt. JSON lines:

- `candidates`: 1 to 1,000 candidates of one request, for `din` (as ctr_simtier is served) and for
  `layers` (features side by side, two thirds of them of the user, 512 units);
- `layout`: `layers` whose features of user and item alternate, in so many pieces: contiguous (what
  is served) and fragmented (each piece is multiplied alone);
- `share`: `layers` by the share of the features that are of the user, du / (du + di);
- `endpoint`: `/v1/rank` of the application itself, from the request's bytes to the answer's, for
  given candidates and (`cascade`) for what recall finds, with MaRI and without; users of 20 clicks
  come back, so their histories are stored, but for `new`;
- `training`: shown items a second of DIN over ids at width 16 (benchmarks/ctr_step.py).

What is compared takes turns. Times of models are the thread's CPU time on one thread, so that other
work on the machine counts little: medians over the rounds, with the quartiles of the ratio to the
plain model. `limit_ms` is what a product of large matrices, measured in the same rounds, would need
for the multiply-adds that remain. The endpoint has wall times, and its CPU time beside. The last
line has the headline figures.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from fastapi import FastAPI

from benchmarks import ctr_step, mari
from karma_ray import cli
from karma_ray.errors import InputError
from karma_ray.ranking.load import load_ranker
from karma_ray.retrieval.parts import served
from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving.app import build_app
from karma_ray.serving.engine import Engine
from karma_ray.serving.host import settle
from karma_ray.serving.ranking import ServedRanker, check_ranker
from karma_ray.serving.service import CACHE_BYTES, Service

SHOP = {"num_users": 300}
SMALL = (
    "pretrain.steps=0", "warmup.steps=2", "training.steps=2", "training.batch_size=8",
    "training.validate_every=2", "evaluation.max_examples=20",
)  # fmt: skip
HISTORY, USERS = 20, 20
QUERIES = ("", "red", "blue vase", "large chair")
Line = dict[str, Any]


def made(folder: str) -> tuple[str, str]:
    """Make RUN and RUN2 in a folder, in processes of their own."""
    data, first, second = f"{folder}/data", f"{folder}/run", f"{folder}/ranker"
    Path(folder, "shop.json").write_text(json.dumps(SHOP))
    settings = [word for setting in SMALL for word in ("--set", setting)]
    train = ["-m", "karma_ray.runs", "--data", data, "--cache", f"{folder}/cache"]
    for words in (
        ["jobs/import_data.py", "toy_shop", f"{folder}/shop.json", data],
        [*train, "--recipe", "action_only", "--out", first, *settings],
        [*train, "--recipe", "ctr_simtier", "--vectors", first, "--out", second],
    ):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, check=True, capture_output=True
        )
    return first, second


class Caller:
    """Calls an application as its host does, without sockets."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def ask(self, body: bytes) -> dict[str, Any]:
        """Return the answer of `/v1/rank`."""
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": "/v1/rank", "raw_path": b"/v1/rank", "root_path": "",
            "query_string": b"", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
            "headers": [
                (b"host", b"here"), (b"content-length", str(len(body)).encode()),
                (b"content-type", b"application/json"),
            ],
        }  # fmt: skip
        parts: list[bytes] = []
        statuses: list[int] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            else:
                parts.append(message.get("body", b""))

        await self._app(scope, receive, send)  # type: ignore[arg-type]
        answer: dict[str, Any] = json.loads(b"".join(parts))
        if statuses != [200]:
            raise SystemExit(f"/v1/rank answered {statuses}: {answer}")
        return answer


class Endpoint:
    """An endpoint with MaRI and one without, of the same runs."""

    def __init__(self, run: str, ranker: str) -> None:
        check_ranker(ranker, served(run))
        retriever = Retriever.load(run)
        self._ids = retriever.table.item_ids
        self.callers: dict[str, Caller] = {}
        for name in ("mari", "plain"):
            rates = ServedRanker(load_ranker(ranker), retriever, mari=name == "mari")
            service = Service(retriever)
            service.swap(Engine(retriever, CACHE_BYTES, ranker=rates))
            self.callers[name] = Caller(build_app(service))
        self._draw = random.Random(0)
        self._users = [self._clicks() for _ in range(USERS)]
        settle()

    def _clicks(self) -> list[dict[str, str]]:
        return [{"item_id": self._draw.choice(self._ids)} for _ in range(HISTORY)]

    def body(self, candidates: int, kind: str) -> bytes:
        """Draw a request."""
        history = self._clicks() if kind == "new" else self._draw.choice(self._users)
        asked: dict[str, Any] = {"query": self._draw.choice(QUERIES), "history": history}
        if kind == "cascade":
            asked["k"] = candidates
        else:
            asked["item_ids"] = self._draw.sample(self._ids, candidates)
        return json.dumps(asked).encode()

    async def measure(self, candidates: int, kind: str, rounds: int) -> Line:
        """Let both answer the same requests in turn."""
        wall: dict[str, list[float]] = {name: [] for name in self.callers}
        cpu: dict[str, list[float]] = {name: [] for name in self.callers}
        stages: dict[str, list[float]] = {}
        order = list(self.callers.items())
        for number in range(-USERS, rounds):
            body = self.body(candidates, kind)
            for name, caller in order:
                begin = time.perf_counter(), time.process_time()
                answer = await caller.ask(body)
                end = time.perf_counter(), time.process_time()
                if number >= 0:
                    wall[name].append(1000 * (end[0] - begin[0]))
                    cpu[name].append(1000 * (end[1] - begin[1]))
                    for stage, value in answer["stages_ms"].items() if name == "mari" else ():
                        stages.setdefault(stage, []).append(value)
            order.append(order.pop(0))
        line: Line = {"part": "endpoint", "kind": kind, "candidates": candidates}
        for name in self.callers:
            low, middle, high = statistics.quantiles(wall[name], n=4)
            line[f"{name}_p50_ms"] = round(middle, 2)
            line[f"{name}_quartiles_ms"] = [round(low, 2), round(high, 2)]
            line[f"{name}_cpu_ms"] = round(statistics.median(cpu[name]), 2)
        ratios = [a / b for a, b in zip(cpu["plain"], cpu["mari"], strict=True)]
        line["mari_speedup"] = round(statistics.median(ratios), 3)
        line["stages_ms"] = {n: round(statistics.median(v), 2) for n, v in stages.items()}
        print(json.dumps(line), flush=True)
        return line


def endpoint_lines(run: str, ranker: str, rounds: int, quick: bool) -> list[Line]:
    """Measure the part `endpoint`."""
    endpoint = Endpoint(run, ranker)
    points = [("stored", 500), ("cascade", 500), ("new", 500)]
    if not quick:
        points += [("stored", candidates) for candidates in (1, 50, 100, 200, 1000)]

    async def all_points() -> list[Line]:
        return [await endpoint.measure(count, kind, rounds) for kind, count in points]

    return asyncio.run(all_points())


def training_line(rounds: int) -> Line:
    """Measure the part `training`."""
    found, rows = ctr_step.measured(10_000, 16, HISTORY, 256, os.cpu_count() or 1, rounds)
    line: Line = {"part": "training", "rows": rows}
    for name, (wall, cpu) in found.items():
        line |= {f"{name}_ms": round(1000 * wall, 2), f"{name}_cpu_ms": round(1000 * cpu, 2)}
    line["rows_per_s"] = round(rows / found["step"][0])
    print(json.dumps(line), flush=True)
    return line


def headline(models: list[Line], endpoint: list[Line], training: Line) -> Line:
    """Return the figures by which runs of this benchmark are compared."""
    at = {
        line["model"]: line
        for line in models
        if line["part"] == "candidates" and line["candidates"] == 500
    }
    asked = {line["kind"]: line for line in endpoint if line["candidates"] == 500}
    return {
        "mari_speedup": at["din"]["mari_speedup"],
        "mari_speedup_layers": at["layers"]["mari_speedup"],
        "over_limit_layers": round(at["layers"]["mari_ms"] / at["layers"]["limit_ms"], 3),
        "p50_ms_500": asked["stored"]["mari_p50_ms"],
        "p50_ms_500_cascade": asked["cascade"]["mari_p50_ms"],
        "endpoint_speedup": asked["stored"]["mari_speedup"],
        "rows_per_s": training["rows_per_s"],
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("run", metavar="RUN", nargs="?", help="finished run that recalls")
    flags.add_argument(
        "--ranker", metavar="RUN2", help="finished run of ctr_simtier of its vectors"
    )
    flags.add_argument("--rounds", type=int, default=41, help="turns of every model (41)")
    flags.add_argument("--quick", action="store_true", help="fewer points and rounds")
    given = flags.parse_args(argv)
    if (given.run is None) != (given.ranker is None):
        raise InputError("--ranker", given.ranker, "goes with RUN: name both runs, or none")
    torch.set_num_threads(1)
    models = mari.models_alone(9 if given.quick else given.rounds, given.quick)
    with tempfile.TemporaryDirectory() as folder:
        run, ranker = (given.run, given.ranker) if given.run else made(folder)
        endpoint = endpoint_lines(run, ranker, 40 if given.quick else 200, given.quick)
    training = training_line(10 if given.quick else 30)
    print(json.dumps(headline(models, endpoint, training)), flush=True)


if __name__ == "__main__":
    cli.run(main)

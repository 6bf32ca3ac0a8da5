"""What serves, run beside run: the same tensors, the same size, the same time a request.

    python benchmarks/bundles.py ACTION_ONLY KARMA [RUN ...] [--rounds 9] [--requests 100]

Decoders train and do not serve (method 1.11), so a KARMA bundle must be what an action-only one is.
Requests (titles of drawn items as queries, histories of 1, 5 and 20 drawn items) are answered
one at a time by each run in turn, so that whatever else the machine does meets all alike; the
first run a second time, under the name `again`, says how much of a ratio is noise. JSON lines, one
a run; the last line holds the headline. Runs whose items are not the same are refused.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from safetensors import safe_open

from karma_ray import cli
from karma_ray.artifacts import RunFolder, absolute
from karma_ray.errors import InputError
from karma_ray.retrieval.requests import HistoryItem, Request
from karma_ray.retrieval.retriever import Retriever

HISTORIES = (1, 5, 20)
TOP = 200


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("runs", metavar="RUN", nargs="+", help="finished runs on the same data")
    flags.add_argument("--rounds", type=int, default=9, help="times that every request is asked")
    flags.add_argument("--requests", type=int, default=100, help="requests of a round")
    arguments = flags.parse_args(argv)
    if len(arguments.runs) < 2:
        raise InputError("RUN", arguments.runs, "name at least two runs to compare")
    runs = [absolute(run) for run in arguments.runs]
    retrievers = [Retriever.load(run) for run in runs]
    for run, other in zip(arguments.runs[1:], retrievers[1:], strict=True):
        if sorted(other.table.item_ids) != sorted(retrievers[0].table.item_ids):
            raise InputError("RUN", run, f"does not have the items of {arguments.runs[0]}")
    requests = _requests(retrievers[0], arguments.requests)
    seconds = _timed([*retrievers, retrievers[0]], requests, arguments.rounds)
    again = seconds.pop()
    tensors = [_tensors(Path(RunFolder(run).bundle)) for run in runs]
    lines: list[dict[str, Any]] = []
    for run, took, held in zip(runs, seconds, tensors, strict=True):
        lines.append({
            "run": run.rsplit("/", 1)[-1],
            "tensors": len(held),
            "parameters": int(sum(np.prod(shape) for shape, _ in held.values())),
            "bundle_bytes": _size(Path(RunFolder(run).bundle)),
            "same_tensors_as_first": held == tensors[0],
            "median_ms": round(1e3 * statistics.median(took), 3),
            "over_first": round(_ratio(took, seconds[0]), 3),
        })  # fmt: skip
        print(json.dumps(lines[-1]), flush=True)
    print(json.dumps({
        "same_tensors": all(line["same_tensors_as_first"] for line in lines),
        "largest_bytes_over_first": round(
            max(line["bundle_bytes"] for line in lines) / lines[0]["bundle_bytes"], 5
        ),
        "slowest_over_first": max(line["over_first"] for line in lines),
        "again_over_first": round(_ratio(again, seconds[0]), 3),
    }))  # fmt: skip


def _requests(retriever: Retriever, count: int) -> list[Request]:
    generator, table = np.random.default_rng(0), retriever.table
    drawn = generator.integers(len(table.item_ids), size=(count, 1 + max(HISTORIES)))
    return [
        Request(
            table.titles[rows[0]],
            [HistoryItem(table.item_ids[row]) for row in rows[1 : 1 + HISTORIES[number % 3]]],
        )
        for number, rows in enumerate(drawn)
    ]


def _timed(retrievers: list[Retriever], requests: list[Request], rounds: int) -> list[list[float]]:
    """Median seconds over the rounds of every request, for every retriever; one round warms up."""
    found = np.zeros((rounds + 1, len(retrievers), len(requests)))
    for turn in range(rounds + 1):
        for number, request in enumerate(requests):
            for place in np.roll(np.arange(len(retrievers)), turn + number):
                started = time.perf_counter()
                retrievers[place].recall_batch([request], TOP)
                found[turn, place, number] = time.perf_counter() - started
    medians: list[list[float]] = np.median(found[1:], axis=0).tolist()
    return medians


def _ratio(took: list[float], first: list[float]) -> float:
    """Median over the requests of a request's time over that of the first run."""
    return statistics.median(a / b for a, b in zip(took, first, strict=True))


def _tensors(bundle: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """File and name -> shape and type, of everything in the bundle."""
    held = {}
    for path in sorted(bundle.rglob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (a handle, no mapping)
                part = file.get_slice(name)
                key = f"{path.relative_to(bundle)}:{name}"
                held[key] = (tuple(part.get_shape()), str(part.get_dtype()))
    return held


def _size(bundle: Path) -> int:
    return sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())


if __name__ == "__main__":
    cli.run(main)

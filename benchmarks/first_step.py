"""Measure the way from `ray job submit` to the first step of training, with everything warm.

    python benchmarks/first_step.py [--data URI] [--recipe NAME] [--rounds N] [--set PATH=VALUE]

A local cluster with a job server is up, the data are prepared and the warm-up cache is full (a
first job does both, and is not counted). Then `jobs/train.py` is submitted again and again. JSON
lines: one a round with the seconds from the submission to each moment of RUN/cost.json, and of
each process its start and the CPU seconds that it had used when the first step was done, which
other work on the machine changes least; then the medians.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from benchmarks.every_job import LocalCluster
from karma_ray import cli
from karma_ray.artifacts import RunFolder, absolute, exists, read_json
from karma_ray.errors import KarmaRayError
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.runs.sources import toy_shop
from karma_ray.runs.stopping import stop_on_signals

SHORT = (
    "pretrain.steps=20", "warmup.steps=20", "training.steps=2", "training.report_every=1",
    "training.validate_every=0", "training.checkpoint_every=0", "training.threads_per_worker=1",
    "evaluation.max_examples=40",
)  # fmt: skip
"""What is not measured is cut short; shapes of the models and batches are the recipe's."""
MOMENTS = (
    ("driver", "process", "driver's Python began"),
    ("driver", "libraries", "libraries loaded"),
    ("driver", "data", "data opened"),
    ("driver", "first_stages", "warmed-up weights found, workers asked for"),
    ("worker", "process", "worker's Python began"),
    ("worker", "entered", "worker ready, with all others"),
    ("worker", "model", "model built"),
    ("worker", "first_step", "first step done"),
)
"""Process, name in RUN/cost.json, and what it means, in order."""
PERIOD_S = 0.5


class CpuClock:
    """Follows the CPU time of every process below this one."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, dict[int, float]]] = []
        self._began: dict[int, float] = {}
        self._names: dict[int, str] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CpuClock:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def between(self, begin: float, end: float) -> dict[str, list[float]]:
        """Return [start after `begin`, CPU seconds between two times since 1970] by process.

        What was up before has a negative start; less than a tenth of a second is left out.
        """
        before, after = self._at(begin), self._at(end)
        return {
            f"{self._names[pid]} {pid}": [round(self._began[pid] - begin, 2), round(spent, 2)]
            for pid in sorted(after, key=lambda pid: self._began[pid])
            if (spent := after[pid] - before.get(pid, 0.0)) >= 0.1
        }

    def _at(self, when: float) -> dict[int, float]:
        return min(self._samples, key=lambda sample: abs(sample[0] - when))[1]

    def _watch(self) -> None:
        used: dict[int, float] = {}
        while not self._done.wait(PERIOD_S):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # it has ended: what it used last still counts
                    times, name = process.cpu_times(), _name(process.cmdline())
                    used[process.pid] = times.user + times.system
                    self._began[process.pid] = process.create_time()
                    if name != "ray::IDLE" or process.pid not in self._names:
                        self._names[process.pid] = name  # what Ray gave it to do
            self._samples.append((time.time(), dict(used)))


def _name(command: list[str]) -> str:
    words = [Path(word).name for word in command if not word.startswith("-")]
    if command and command[0].startswith("ray::"):
        return command[0].partition("(")[0].partition(".")[0].strip()
    return " ".join(words[1:4] if words and words[0].startswith("python") else words[:1])


def main(argv: list[str] | None = None) -> None:
    """Measure and print; raises KarmaRayError if a job fails."""
    flags = cli.parser(__doc__ or "", config=True)
    flags.add_argument("--data", metavar="URI", help="data folder (default: the toy shop)")
    flags.add_argument("--out", help="folder that keeps data and cache (default: a temporary one)")
    flags.add_argument("--rounds", type=int, default=3, help="submissions (default 3)")
    arguments = flags.parse_args(argv)
    arguments.assignments = [*SHORT, *arguments.assignments]
    config = cli.load_config(arguments, "karma_text")
    stop_on_signals()  # SIGTERM too ends the cluster
    out = Path(arguments.out or tempfile.mkdtemp(prefix="first-step-")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    cache = str(out / "cache")
    data = absolute(arguments.data) if arguments.data else toy_shop(cache)
    ensure_prepared(data, config.prepare)
    words = ["--data", data, "--cache", cache, "--recipe", config.recipe]
    for assignment in arguments.assignments:
        words += ["--set", assignment]
    with CpuClock() as clock, LocalCluster(out) as cluster:
        if not exists(RunFolder(warm := str(out / "warm")).metrics):
            _submit(cluster, warm, words)
        runs = [str(out / f"run-{os.getpid()}-{number}") for number in range(arguments.rounds)]
        rounds = [_round(cluster, clock, run, words) for run in runs]
    medians = {
        name: round(statistics.median(one["seconds"][name] for one in rounds), 1)
        for name in rounds[0]["seconds"]
    }
    total = statistics.median(one["cpu"] for one in rounds)
    print(json.dumps({"median_seconds": medians, "median_cpu_seconds": total}))


def _round(cluster: LocalCluster, clock: CpuClock, run: str, words: list[str]) -> dict[str, Any]:
    """Submit the job; print and return the seconds to each moment, and what they cost."""
    begun = time.time()
    _submit(cluster, run, words)
    reached = read_json(RunFolder(run).path("cost.json"))["reached"]
    seconds = {told: round(reached[who][name] - begun, 2) for who, name, told in MOMENTS}
    processes = clock.between(begun, reached["worker"]["first_step"])
    cpu = round(sum(spent for _, spent in processes.values()), 1)
    found = {"seconds": seconds, "cpu": cpu, "whole": round(time.time() - begun, 1)}
    print(json.dumps({**found, "processes": processes}), flush=True)
    return found


def _submit(cluster: LocalCluster, run: str, words: list[str]) -> None:
    code, said = cluster.submit(Path(run).name, "jobs/train.py", *words, "--out", run)
    if code:
        raise KarmaRayError(f"the job failed:\n{said[-3000:]}")


if __name__ == "__main__":
    cli.run(main)

"""A driver on a cluster that grows: `python -m tests.cluster.growing FOLDER RUN DATA`.

It trains, embeds and searches where no GPU is up, and writes to FOLDER/seen how many GPUs were up
before and after each, and once the nodes were idle for longer than their time; and to
FOLDER/events.jsonl when nodes came and went and what ran on them, which benchmarks/timeline.py
draws.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import ray
from ray._private import state as control

from karma_ray.artifacts import join
from karma_ray.cluster.embedding import embed_items
from karma_ray.cluster.session import connect
from karma_ray.cluster.training import run_training
from karma_ray.cluster.tuning import search
from karma_ray.config import Config
from tests.cluster import test_training as small
from tests.cluster.fake_gpus import noting_step
from tests.cluster.test_tuning import space

PATIENCE_S = 120.0
WORKERS = {"RayTrainWorker": "training", "MapWorker": "embedding", "ImplicitFunc": "searching"}
"""What the actors of each class do; Ray Tune's name for a function is ImplicitFunc."""


class Watch(threading.Thread):
    """Writes an event when a node comes or goes, and when a worker starts or ends on it."""

    def __init__(self, file: Path) -> None:
        super().__init__(name="watch", daemon=True)
        self._file, self._begun, self._over = file, time.monotonic(), threading.Event()
        self._nodes: dict[str, str] = {}  # the name of each node that ever was, by its id
        self._seen: set[tuple[str, str, str]] = set()  # (node, what, id)

    def run(self) -> None:
        while not self._over.wait(0.3):
            alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
            self._look(alive)

    def stop(self) -> None:
        """Write nothing from here on."""
        self._over.set()
        self.join()

    def _look(self, alive: dict[str, dict[str, float]]) -> None:
        for node, resources in alive.items():
            number = len(self._nodes)
            self._nodes.setdefault(node, f"GPU node {number}" if "GPU" in resources else "head")
        now = {(self._nodes[node], "", "") for node in alive}
        for actor in control.actors().values():
            kind = actor["ActorClassName"].split("(")[0].rsplit(".", 1)[-1]
            node = actor["Address"]["NodeID"]
            if actor["State"] == "ALIVE" and node in alive and kind in WORKERS:
                now.add((self._nodes[node], WORKERS[kind], actor["ActorID"]))
        moment = round(time.monotonic() - self._begun, 1)
        with self._file.open("a") as lines:
            for node, what, number in [*sorted(now - self._seen), *sorted(self._seen - now)[::-1]]:
                here = (node, what, number) in now
                event = ("started" if here else "ended") if what else ("joined" if here else "left")
                why = what or ("" if here else "idle")
                line = {"t": moment, "event": event, "node": node, "what": why}
                print(json.dumps(line), file=lines)
        self._seen = now


def gpus() -> int:
    """The GPUs that are up."""
    return int(ray.cluster_resources().get("GPU", 0))


def search_on_a_gpu(folder: str) -> None:
    """Search with one trial, on a GPU of its own, which notes what it was given."""

    # Defined here, so that the trial's process gets it by value.
    def at_once(config: Config, data: str | None, out: str, *, resume, on_validate) -> None:
        facts = {"gpus": ray.get_runtime_context().get_accelerator_ids()["GPU"]}
        Path(folder, "trial.json").write_text(json.dumps(facts))
        time.sleep(2.0)  # as long as the watch needs to see it
        on_validate(config.training.steps, {"HR@50": 1.0})

    search(
        space(), space().base(), data=None, trials=1, out=join(folder, "search"),
        gpus_per_trial=1.0, train=at_once,
    )  # fmt: skip


def main(folder: str, run: str, data: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    seen = Path(folder, "seen")

    def note(what: str) -> None:
        with seen.open("a") as lines:
            lines.write(f"{what} {gpus()}\n")

    def idle() -> None:
        end = time.monotonic() + PATIENCE_S
        while gpus() and time.monotonic() < end:
            time.sleep(0.5)
        note("idle")

    connect()
    watch = Watch(Path(folder, "events.jsonl"))
    watch.start()
    note("before")
    job = small._job(Path(folder, "run"), small.write_rows(Path(folder)), num_workers=1, steps=4)
    run_training(replace(job, step=partial(noting_step, folder)), progress=False)
    note("trained")
    idle()
    embed_items(join(run, "bundle"), data, join(folder, "embedded"))
    note("embedded")
    idle()
    search_on_a_gpu(folder)
    note("searched")
    idle()
    watch.stop()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])

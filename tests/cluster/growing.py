"""A driver on a cluster that grows: `python -m tests.cluster.growing FOLDER RUN DATA`.

It trains and embeds where no GPU is up, and writes to FOLDER/seen how many GPUs were up before and
after each, and once the nodes were idle for longer than their time.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import ray

from karma_ray.artifacts import join
from karma_ray.cluster.embedding import embed_items
from karma_ray.cluster.session import connect
from karma_ray.cluster.training import run_training
from tests.cluster import test_training as small
from tests.cluster.fake_gpus import noting_step

PATIENCE_S = 120.0


def gpus() -> int:
    """The GPUs that are up."""
    return int(ray.cluster_resources().get("GPU", 0))


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
    note("before")
    job = small._job(Path(folder, "run"), small.write_rows(Path(folder)), num_workers=1, steps=4)
    run_training(replace(job, step=partial(noting_step, folder)), progress=False)
    note("trained")
    idle()
    embed_items(join(run, "bundle"), data, join(folder, "embedded"))
    note("embedded")
    idle()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Train, search and make features on machines that share no disk, and lose one of them on the way.

    python benchmarks/own_disks.py

The machines are `ray start` nodes in mount namespaces of their own, with a stand-in for S3 between
them; that needs Linux, and the test dependencies. JSON lines: what happened (seconds, what, on
which machine; `workers start` says after which step of a stage, and where), and the events that
benchmarks/timeline.py draws.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest

from karma_ray.cli import parser, run
from tests.cluster import nodes, own_disks
from tests.cluster.stores import running_store


def drawable(timeline: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events of a timeline as benchmarks/timeline.py reads them."""
    events: list[dict[str, Any]] = []
    working: dict[str, str] = {}  # machine -> what its worker does

    def add(t: float, event: str, node: str, what: str = "") -> None:
        events.append({"t": t, "event": event, "node": node, "what": what})

    def end_all(t: float) -> None:
        for node, what in list(working.items()):
            add(t, "ended", node, what)
        working.clear()

    for found in timeline:
        t, what = found["at"], found["what"]
        if what == "joins":
            add(t, "joined", found["machine"])
        elif what == "is lost":
            working.pop(found["machine"], None)
            add(t, "left", found["machine"], "killed")
        elif what == "workers start":
            end_all(t)
            for node in found["machines"]:
                working[node] = f"{found['stage']} from step {found['step']}"
                add(t, "started", node, working[node])
        elif what == "starts" and found["job"] != "jobs/train.py":  # whose workers are shown
            add(t, "started", found["machine"], found["job"])
        elif what == "ends":
            end_all(t)
            if found["job"] != "jobs/train.py":
                add(t, "ended", found["machine"], found["job"])
    return events


def main(argv: list[str] | None = None) -> None:
    """Print the timeline."""
    parser(__doc__ or "").parse_args(argv)
    runs = nodes.ROOT / "runs"
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as here,
        nodes.short_folder() as disk,
        running_store(patch) as store,
    ):
        own_disks.fill_store(Path(here, "shop"))
        hidden = [Path(here), *([runs] if runs.is_dir() else [])]
        with own_disks.two_machines(Path(here), disk, hidden, store.environment) as machines:
            own_disks.train_while_one_is_lost(machines, "127.0.0.1", "127.0.0.2")
            own_disks.search(machines, "127.0.0.1")
            own_disks.pooled_features(machines, "127.0.0.1")
    for event in [*machines.timeline, *drawable(machines.timeline)]:
        print(json.dumps(event))


if __name__ == "__main__":
    run(main)

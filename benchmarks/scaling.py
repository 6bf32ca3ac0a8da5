"""Measure weak scaling: user windows per CPU second of the workers on 1, 2 and 4 simulated nodes.

    python benchmarks/scaling.py [--data URI] [--recipe NAME] [--nodes N ...] [--steps N]

A node is a `ray start` with one CPU; all are on this machine, so the time that passes says nothing
once they outnumber its cores. What a core second is worth does: each node has one worker with
`training.batch_size` windows a step, and counted is the CPU time of all worker processes, threads
of Ray and of the collectives included, between two steps of one training. JSON lines; `efficiency`
is the work per core second relative to the first number of nodes. benchmarks/communication.py
counts what the workers send.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Nodes and driver would each make a token of their own. They listen on loopback, for minutes.
os.environ["RAY_AUTH_MODE"] = "disabled"

import ray

from benchmarks.cpu_meter import CpuMeter
from benchmarks.every_job import free_port
from karma_ray import cli
from karma_ray.artifacts import absolute, join, read_lines
from karma_ray.cluster.session import connect
from karma_ray.cluster.training import run_training
from karma_ray.config import Config
from karma_ray.runs.first_stages import start_stage
from karma_ray.runs.joint import joint_job
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.runs.sources import CACHE, toy_shop
from karma_ray.runs.stopping import stop_on_signals
from tests.cluster.nodes import kill

WARM = 8
"""Steps before the first one counted."""


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = cli.parser(__doc__ or "", config=True)
    flags.add_argument("--data", metavar="URI", help="data folder (default: the toy shop)")
    flags.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4], help="(1 2 4)")
    flags.add_argument("--steps", type=int, default=40, help="steps of a training (default 40)")
    arguments = flags.parse_args(argv)
    config = _config(cli.load_config(arguments, "karma_text"), arguments.steps)
    stop_on_signals()  # SIGTERM too ends the nodes
    data = absolute(arguments.data) if arguments.data else toy_shop()
    source = ensure_prepared(data, config.prepare)
    stage = start_stage(config, source, absolute(CACHE))
    first = None
    for nodes in arguments.nodes:
        windows = nodes * config.training.batch_size
        training = replace(stage.config.training, num_workers=nodes, batch_size=windows)
        scaled = replace(stage, config=replace(stage.config, training=training))
        with tempfile.TemporaryDirectory() as run, cluster(nodes):
            job = joint_job(scaled, source, run)
            meter = CpuMeter(job.before_step, arguments.steps, WARM)
            job = replace(job, before_step=meter, validate=meter.totals, probe=None)
            used = run_training(job, progress=False)["valid"]
            lines = [line for line in read_lines(join(run, "metrics.jsonl")) if "lr" in line]
        cpu, others = used["cpu_per_step"], used["others_per_step"]
        work = windows / cpu
        first = first or work
        point = {
            "nodes": nodes, "windows_per_step": windows, "cpu_seconds_per_step": round(cpu, 4),
            "of_other_threads": round(others, 4),
            "windows_per_core_second": round(work, 2), "efficiency": round(work / first, 3),
            "duplicates_removed": round(lines[-1]["work/duplicates_removed"], 3),
        }  # fmt: skip
        print(json.dumps(point), flush=True)


def _config(config: Config, steps: int) -> Config:
    """One thread a worker, no evaluation, and untrained weights, which cost as much to train."""
    training = replace(
        config.training, steps=steps, report_every=steps, checkpoint_every=0, encoder_delay=0.0,
        validate_every=0, threads_per_worker=1,
    )  # fmt: skip
    return replace(
        config, training=training,
        pretrain=replace(config.pretrain, steps=0), warmup=replace(config.warmup, skip=True),
    )  # fmt: skip


@contextmanager
def cluster(nodes: int) -> Iterator[None]:
    """Start nodes of one CPU each, and join them; all processes end with the block."""
    port, folder = free_port(), Path(f"/tmp/kr-{os.getpid()}-{nodes}")  # sockets: a short path
    address = f"127.0.0.1:{port}"
    head = ["--head", "--port", str(port), "--include-dashboard", "false",
            "--node-ip-address", "127.0.0.1", "--temp-dir", str(folder)]  # fmt: skip
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus", "1",
               "--object-store-memory", str(128 * 2**20)]  # fmt: skip
    processes: list[subprocess.Popen[bytes]] = []
    os.environ["RAY_ADDRESS"] = address
    try:
        for number in range(nodes):
            flags = head if number == 0 else ["--address", address]
            processes.append(
                subprocess.Popen(
                    [*command, *flags], start_new_session=True, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )  # fmt: skip
            _wait(address, number + 1)
        yield
    finally:
        ray.shutdown()
        del os.environ["RAY_ADDRESS"]
        for process in processes:
            kill(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(address: str, nodes: int) -> None:
    """Join the cluster once it listens, and wait until it has so many nodes."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with suppress(ConnectionError, RuntimeError, ValueError):
            connect()
            if sum(node["Alive"] for node in ray.nodes()) >= nodes:
                return
        time.sleep(0.5)
    raise TimeoutError(f"{nodes} nodes at {address}: not within two minutes")


if __name__ == "__main__":
    cli.run(main)

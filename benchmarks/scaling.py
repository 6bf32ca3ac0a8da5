"""Measure weak scaling: work per CPU second on 1, 2 and 4 simulated nodes.

    python benchmarks/scaling.py [--data URI] [--recipe NAME] [--nodes N ...] [--steps N]
    python benchmarks/scaling.py --what import|prepare [--nodes N ...] [--each PAGES]
    python benchmarks/scaling.py --what embed [--nodes N ...] [--each ITEMS]

A node is a `ray start` with one CPU; all are on this machine, so the time that passes says nothing
once they outnumber its cores. What a core second is worth does: each node has one worker with
`training.batch_size` windows a step, and counted is the CPU time of all worker processes, threads
of Ray and of the collectives included, between two steps of one training.
benchmarks/communication.py counts what the workers send.

`prepare` (a generated log of `--each` pages for every node), `import` (the same as CSV, with eight
rows a page) and `embed` (as many drawn items, tiny encoder) are run between two runs with a
sixteenth of it, the second of which is subtracted: what remains is not of starting. Counted are the
CPU seconds of the driver and of all processes of all nodes. JSON lines; `efficiency` is the work
per core second relative to the first number of nodes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Nodes and driver would each make a token of their own. They listen on loopback, for minutes.
os.environ["RAY_AUTH_MODE"] = "disabled"

import polars as pl
import psutil
import ray

from benchmarks.cpu_meter import CpuMeter
from benchmarks.encode import Case
from benchmarks.every_job import free_port
from benchmarks.prepare import generate
from karma_ray import cli
from karma_ray.artifacts import absolute, join, read_lines
from karma_ray.cluster.embedding import embed_items
from karma_ray.cluster.session import connect
from karma_ray.cluster.sharding import run_on_ray
from karma_ray.cluster.training import run_training
from karma_ray.config import Config
from karma_ray.data.config import PrepareConfig
from karma_ray.data.event_parts import Sizes
from karma_ray.data.importers.import_work import ImportSizes
from karma_ray.data.importers.long import import_long
from karma_ray.runs.first_stages import start_stage
from karma_ray.runs.joint import joint_job
from karma_ray.runs.preparation import ensure_prepared, prepare
from karma_ray.runs.sources import CACHE, toy_shop
from karma_ray.runs.stopping import stop_on_signals
from tests.cluster.nodes import kill

WARM = 8
"""Steps before the first one counted."""
EACH = {"import": 500_000, "prepare": 500_000, "embed": 16_384}
"""Pages, or items, of a node."""


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = cli.parser(__doc__ or "", config=True)
    flags.add_argument("--data", metavar="URI", help="data folder (default: the toy shop)")
    flags.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4], help="(1 2 4)")
    flags.add_argument("--steps", type=int, default=40, help="steps of a training (default 40)")
    flags.add_argument("--what", choices=["training", *EACH], default="training")
    flags.add_argument("--each", type=int, help="pages or items of a node (500,000; items 16,384)")
    arguments = flags.parse_args(argv)
    if arguments.what != "training":
        stop_on_signals()
        scale_data(arguments.what, arguments.nodes, arguments.each or EACH[arguments.what])
        return
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


def scale_data(what: str, counts: list[int], each: int) -> None:
    """Print the work per core second of a job on data, for each number of nodes."""
    first, work = None, {"import": import_log, "prepare": prepare_log, "embed": embed_drawn}[what]
    for nodes in counts:
        much, little = nodes * each, nodes * each // 16
        used = []
        with tempfile.TemporaryDirectory() as folder, cluster(nodes) as processes:
            meter = TreeMeter(processes)
            meter.start()
            for turn, amount in enumerate((little, much, little)):
                job = work(amount, nodes, join(folder, str(turn)))
                before = meter.seconds()
                job()
                used.append(meter.seconds() - before)
            meter.over.set()
            meter.join()
        _, cpu, fixed = used
        rate = (much - little) / (cpu - fixed)
        first = first or rate
        point = {
            "what": what, "nodes": nodes, "amount": much, "cpu_seconds": round(cpu, 2),
            "cpu_seconds_of_a_sixteenth": round(fixed, 2),
            "work_per_core_second": round(rate, 2), "efficiency": round(rate / first, 3),
        }  # fmt: skip
        print(json.dumps(point), flush=True)


def import_log(pages: int, nodes: int, folder: str) -> Callable[[], object]:
    """Write a log with a row per exposure, and return what imports it on Ray."""
    generate(Path(folder, "data"), pages)
    shown = pl.read_parquet(f"{folder}/data/events/*.parquet").explode("exposed_item_ids")
    rows = shown.select(
        "user_id", "timestamp", "query", pl.col("exposed_item_ids").alias("item_id"),
        pl.col("exposed_item_ids").is_in("clicked_item_ids").alias("clicked"),
    )  # fmt: skip
    Path(folder, "log").mkdir()
    # Four files for each node, and at least as many partitions.
    for number, part in enumerate(rows.iter_slices(-(-rows.height // (4 * nodes)))):
        part.write_csv(f"{folder}/log/{number:05d}.csv")
    sizes = ImportSizes(here_bytes=0, partition_bytes=int(rows.estimated_size()) // (4 * nodes))
    return partial(import_long, f"{folder}/log", f"{folder}/out", items=f"{folder}/data/items",
                   sizes=sizes, run=run_on_ray)  # fmt: skip


def prepare_log(pages: int, nodes: int, folder: str) -> Callable[[], object]:
    """Write a log, and return what prepares it on Ray."""
    # Four parts for each node also in the run that starts the workers.
    generate(Path(folder, "data"), pages, row_group=max(1, pages // (4 * nodes)))
    sizes = Sizes(here_cells=0, part_cells=1)
    return partial(prepare, f"{folder}/data", PrepareConfig(), f"{folder}/out", run_on_ray, sizes)


def embed_drawn(items: int, nodes: int, folder: str) -> Callable[[], object]:
    """Write a bundle and items, and return what embeds them with an encoder on each node."""
    case = Case.write("tiny", items, 64, None, folder)
    size = max(1, items // (4 * nodes))
    return partial(embed_items, case.bundle, case.data, f"{folder}/out", nodes, part_items=size)


class TreeMeter(threading.Thread):
    """Sums the CPU seconds of this process and of all that nodes have started, ended or not."""

    def __init__(self, nodes: list[subprocess.Popen[bytes]]) -> None:
        super().__init__(daemon=True)
        self.nodes, self.over, self.found = nodes, threading.Event(), dict[int, float]()

    def run(self) -> None:
        """Look at all processes again and again, as those that end take their times along."""
        while not self.over.wait(0.3):
            self.seconds()

    def seconds(self) -> float:
        """Return the sum until now."""
        for node in self.nodes:
            with suppress(psutil.Error):
                tree = psutil.Process(node.pid)
                for one in [tree, *tree.children(recursive=True)]:
                    with suppress(psutil.Error):
                        self.found[one.pid] = sum(one.cpu_times()[:2])
        return time.process_time() + sum(self.found.copy().values())


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
def cluster(nodes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start nodes of one CPU each, and join them; all processes end with the block.

    Yields the processes of the nodes.
    """
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
        yield processes
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

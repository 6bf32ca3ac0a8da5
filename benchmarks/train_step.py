"""What Ray costs a training step: the Ray path against the same `fit` on a list of batches.

    python benchmarks/train_step.py [--data URI] [--recipe NAME] [--rounds N] [--steps N] [--quick]

Three ways over the very same batches, interleaved round by round so that a noisy machine hits
all alike: `list` (collated beforehand), `stream` (read and collated ahead by a thread), `ray`
(Ray Train worker fed from Ray Data), each in a new process every round: one that has already
grown to its size would be faster. One point is the time per step between two reports; the first
report of each run, with the first batch in it, is left out. `stream` minus `list` is collation,
`ray` minus `stream` is Ray. CPU time per step is that of the training process alone, which other
work on the machine hardly changes (with two threads or more it includes those that wait for each
other); `ray_cores` are the cores that Ray's other processes took meanwhile. JSON lines; the last
one holds the headline.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from ray import cloudpickle
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cpu_meter import CpuMeter
from benchmarks.first_step import CpuClock
from karma_ray import cli
from karma_ray.artifacts import absolute, join, read_lines
from karma_ray.cluster.session import connect
from karma_ray.cluster.sharding import ensure_prepared
from karma_ray.cluster.training import run_training
from karma_ray.config import Config
from karma_ray.runs.batches import WorkerContext, local_blocks
from karma_ray.runs.first_stages import start_stage
from karma_ray.runs.joint import joint_job
from karma_ray.runs.sources import CACHE, toy_shop
from karma_ray.runs.worker import TrainJob
from karma_ray.training.flops import peak_flops
from karma_ray.training.loop import Record, fit
from karma_ray.training.memory import keep_heap
from karma_ray.training.optim import build_optimizer
from karma_ray.training.step_state import AT_THE_END

REPORT_EVERY = 10
WAYS = ("list", "stream", "ray")
WORKER = "RayTrainWorker"
"""In the name of the process that trains."""


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = cli.parser(__doc__ or "", config=True)
    flags.add_argument("--data", metavar="URI", help="data folder (default: the toy shop)")
    flags.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    flags.add_argument("--steps", type=int, default=60, help="steps a round (default 60)")
    flags.add_argument("--quick", action="store_true", help="2 rounds of 40 steps")
    arguments = flags.parse_args(argv)
    rounds, steps = (2, 40) if arguments.quick else (arguments.rounds, arguments.steps)
    config = _config(cli.load_config(arguments, "karma_text"), steps)
    torch.set_num_threads(config.training.num_threads())
    connect()
    source = ensure_prepared(
        absolute(arguments.data) if arguments.data else toy_shop(), config.prepare
    )
    stage = start_stage(config, source, absolute(CACHE))
    with tempfile.TemporaryDirectory() as folder:
        job = replace(joint_job(stage, source, folder), probe=None, validate=None)
        measure(job, folder, rounds)


def measure(job: TrainJob, folder: str, rounds: int) -> None:
    """Interleave the ways, print each one's figures and the headline."""
    points: dict[str, list[Record]] = {way: [] for way in WAYS}
    used: dict[str, list[Record]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS:
            if way == "ray":
                records, cost = _on_ray(replace(job, run=join(folder, f"round-{number}")))
            else:
                records, cost = _in_new_process(job, way)
            points[way] += records
            used[way].append(cost)
    flops = _step_flops(job)
    half = job.training.precision == "bfloat16"
    limit = peak_flops("cpu", torch.bfloat16 if half else torch.float32)
    medians = {}
    for way, records in points.items():
        times = [1e3 / record["steps_per_s"] for record in records]
        medians[way] = statistics.median(times)
        point = {
            "way": way,
            "points": len(times),
            "ms_per_step": round(medians[way], 2),
            "spread_ms": [round(value, 2) for value in (min(times), max(times))],
            "tokens_per_s": round(statistics.median(r["tokens_per_s"] for r in records)),
            "cpu_ms_per_step": round(1e3 * _median(used[way], "cpu_per_step"), 2),
            "of_other_threads": round(1e3 * _median(used[way], "others_per_step"), 2),
            "page_faults_per_step": round(_median(used[way], "page_faults_per_step")),
            "data_wait_share": round(statistics.median(r["data_wait_share"] for r in records), 4),
            "batch_size": job.training.batch_size,
            "threads": job.training.num_threads(),
            "precision": job.training.precision,
        }
        print(json.dumps(point), flush=True)
    ray = points["ray"]
    cpu = {way: _median(costs, "cpu_per_step") for way, costs in used.items()}
    headline = {
        "ray_over_plain": round(medians["ray"] / medians["list"], 3),
        "cpu_ray_over_plain": round(cpu["ray"] / cpu["list"], 3),
        "cpu_ray_over_stream": round(cpu["ray"] / cpu["stream"], 3),
        "ray_cores": round(_median(used["ray"], "ray_cores"), 3),
        "tokens_per_s": round(statistics.median(record["tokens_per_s"] for record in ray)),
        "share_of_matmul_peak": round(flops / (medians["ray"] / 1e3) / limit, 4),
        "peak_gib": round(max(cost["peak_gib"] for cost in used["ray"]), 3),
        "data_wait_share": round(statistics.median(record["data_wait_share"] for record in ray), 4),
        "stream_over_plain": round(medians["stream"] / medians["list"], 3),
        "ray_over_stream": round(medians["ray"] / medians["stream"], 3),
        "fixed_seconds": round(_median(used["ray"], "fixed_seconds"), 1),
        "gflop_per_step": round(flops / 1e9, 3),
        "matmul_peak_gflops": round(limit / 1e9, 1),
    }
    print(json.dumps(headline), flush=True)


def _config(config: Config, steps: int) -> Config:
    """One worker, no evaluation; untrained weights, which cost the same to train."""
    training = replace(
        config.training,
        steps=steps,
        num_workers=1,
        report_every=REPORT_EVERY,
        checkpoint_every=0,
        encoder_delay=0.0,
        validate_every=0,
    )
    return replace(
        config,
        pretrain=replace(config.pretrain, steps=0),
        warmup=replace(config.warmup, skip=True),
        training=training,
    )


def _meter(job: TrainJob) -> CpuMeter:
    return CpuMeter(job.before_step, job.training.steps, REPORT_EVERY)


def _median(costs: list[Record], name: str) -> float:
    return statistics.median(cost[name] for cost in costs)


def _on_ray(job: TrainJob) -> tuple[list[Record], Record]:
    """The records of a Ray Train worker, but the first, and what it cost, beside Ray's own part."""
    meter, started = _meter(job), time.perf_counter()
    with CpuClock() as clock:
        metered = replace(job, before_step=meter, validate=meter.totals)
        summary = run_training(metered, progress=False)
    reached = summary["reached"]
    begin, end = reached["first_step"], reached["entered"] + summary["seconds"]
    others = {n: cpu for n, (_, cpu) in clock.between(begin, end).items() if WORKER not in n}
    cost = {
        **summary["valid"],
        "ray_cores": sum(others.values()) / (end - begin),
        "fixed_seconds": time.perf_counter() - started - summary["seconds"],
    }
    lines = [line for line in read_lines(join(job.run, "metrics.jsonl")) if "lr" in line]
    return lines[1:], cost


def _in_new_process(job: TrainJob, way: str) -> tuple[list[Record], Record]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_plain, cloudpickle.dumps(job), way).result()


def _plain(pickled: bytes, way: str) -> tuple[list[Record], Record]:
    """The records of `fit` in this process, but the first, and what it cost."""
    job: TrainJob = cloudpickle.loads(pickled)
    torch.set_num_threads(job.training.num_threads())
    keep_heap()  # as a worker does
    batches = _batches(job)
    if way == "list":
        batches = list(batches)
    model = job.build()
    optimizer = _optimizer(job, model)
    records: list[Record] = []
    meter = _meter(job)
    fit(
        model,
        job.step,
        optimizer,
        batches,
        records.append,
        steps=job.training.steps,
        grad_clip=job.training.grad_clip,
        precision=job.training.precision,
        report_every=job.training.report_every,
        before_step=meter,
    )
    return records[1:], dict(meter.totals(model, job.training.steps))


def _optimizer(job: TrainJob, model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(
        model,
        learning_rate=job.training.learning_rate,
        weight_decay=job.training.weight_decay,
        multiplier_of=job.multiplier_of,
    )


def _batches(job: TrainJob) -> Iterable[Any]:
    return job.make_batches(WorkerContext(0, 1, 0, job.training.steps, local_blocks))


def _step_flops(job: TrainJob, num_batches: int = 5) -> float:
    """Matrix-product operations of a step, forward and backward: mean over some batches."""
    model = job.build()
    with FlopCounterMode(display=False) as counter:
        for batch in islice(_batches(job), num_batches):
            torch.autograd.backward(job.step(model, batch, AT_THE_END).loss)
    return float(counter.get_total_flops()) / num_batches


if __name__ == "__main__":
    cli.run(main)

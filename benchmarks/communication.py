"""Count the bytes that the workers of a joint step exchange, beside the formula of docs/scale.md.

    python benchmarks/communication.py [--data URI] [--recipe NAME] [--workers N ...] [--steps N]

Real steps in processes over gloo, on this machine and without Ray; each worker has
`training.batch_size` windows. Counted are the results of the collectives: a sum of n bytes, or
the n bytes gathered from all workers. A ring moves 2 (N - 1) / N of a sum over each worker's
network, and (N - 1) / N of what is gathered. JSON lines: for each number of workers the mean of
the steps by part, counted and by the formula, and the windows for each CPU second of all workers
(without the first step, and without the optimiser).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from ray import cloudpickle
from torch import Tensor

from karma_ray import cli
from karma_ray.artifacts import absolute
from karma_ray.data.batch import Batch
from karma_ray.model.karma import KarmaModel
from karma_ray.runs.batches import WorkerContext, local_blocks
from karma_ray.runs.first_stages import start_stage
from karma_ray.runs.joint import joint_job
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.runs.sources import CACHE, toy_shop
from karma_ray.runs.worker import TrainJob
from karma_ray.training.item_table import share_items
from karma_ray.training.parallel import global_max, global_sum, sum_gradients, world_size
from karma_ray.training.step import JointStep
from karma_ray.training.step_state import AT_THE_END, StepState


@dataclass(frozen=True)
class StepSizes:
    """The sizes that decide how much a step exchanges."""

    workers: int
    weights: int
    """Trained numbers that get a gradient."""
    tensors: int
    """Trained tensors."""
    items: int
    """Unique items of all workers' windows."""
    share: int
    """Items that the worker with the most encodes."""
    table: int
    """Unique items of the worker that has the most."""
    tokens: int
    """Tokens of the longest item."""
    width: int
    logs: int
    """Loss terms and counts that are logged."""

    def bytes(self) -> dict[str, int]:
        """Return the bytes of each part of a step in float32; sharding and LoRA change them."""
        return {
            "gradients": 4 * self.weights,
            "item vectors": 4 * self.workers * self.share * self.width,
            "their gradients": 4 * self.items * self.width,
            "item table": 8 * self.workers * self.table * (4 + self.tokens),
            # Uses and clicks, width of the table, rows of each worker, three divisors, logs, and
            # which tensors have a gradient.
            "counts": 16 + 8 + 8 * self.workers + 24 + 4 * self.logs + 4 * self.tensors,
        }


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count the bytes of this worker's collectives by name and type of number."""
    counts: Counter[str] = Counter()
    reduce, gather = dist.all_reduce, dist.all_gather

    def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        kind = "whole" if not tensor.is_floating_point() else "float"
        counts[f"summed {kind}"] += tensor.nbytes
        return reduce(tensor, *args, **options)

    def all_gather(parts: list[Tensor], *args: Any, **options: Any) -> Any:
        kind = "whole" if not parts[0].is_floating_point() else "float"
        counts[f"gathered {kind}"] += sum(part.nbytes for part in parts)
        return gather(parts, *args, **options)

    dist.all_reduce, dist.all_gather = all_reduce, all_gather  # type: ignore[assignment]
    try:
        yield counts
    finally:
        dist.all_reduce, dist.all_gather = reduce, gather


def counted_step(
    model: KarmaModel, step: JointStep, batch: Batch, state: StepState = AT_THE_END
) -> tuple[Counter[str], StepSizes]:
    """Take a step up to its summed gradients; returns what was exchanged, and the step's sizes."""
    model.zero_grad(set_to_none=True)
    with counting() as counts:
        output = step(model, batch, state)
        if output.loss.requires_grad:
            torch.autograd.backward(output.loss)
        sum_gradients(model.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shared = share_items(batch)
    return counts, StepSizes(
        workers=world_size(),
        weights=sum(p.numel() for p in trained if p.grad is not None),
        tensors=len(trained),
        items=shared.num_items,
        share=max(len(share) for share in shared.shares),
        table=int(global_max(torch.tensor(len(batch.item_rows)))),
        tokens=shared.batch.item_tokens.shape[1],
        width=model.interest.width,
        logs=sum(isinstance(value, Tensor) for value in output.logs.values()),
    )


def main(argv: list[str] | None = None) -> None:
    """Count and print."""
    flags = cli.parser(__doc__ or "", config=True)
    flags.add_argument("--data", metavar="URI", help="data folder (default: the toy shop)")
    flags.add_argument(
        "--workers", type=int, nargs="+", default=[2, 4], help="numbers of workers (2 4)"
    )
    flags.add_argument("--steps", type=int, default=8, help="steps counted (default 8)")
    arguments = flags.parse_args(argv)
    config = cli.load_config(arguments, "karma_text")
    config = replace(
        config,
        pretrain=replace(config.pretrain, steps=0),  # untrained weights exchange as much
        warmup=replace(config.warmup, skip=True),
        training=replace(config.training, steps=arguments.steps, encoder_delay=0.0, num_workers=0),
    )
    data = absolute(arguments.data) if arguments.data else toy_shop()
    source = ensure_prepared(data, config.prepare)
    stage = start_stage(config, source, absolute(CACHE))
    for workers in arguments.workers:
        batch_size = config.training.batch_size
        training = replace(config.training, batch_size=batch_size * workers)
        scaled = replace(stage, config=replace(stage.config, training=training))
        with tempfile.TemporaryDirectory() as folder:
            job = joint_job(scaled, source, folder)
            multiprocessing.spawn(
                _worker, args=(workers, cloudpickle.dumps(job), folder), nprocs=workers
            )
            found = json.loads(Path(folder, "found.json").read_text())
        print(json.dumps({"workers": workers, "windows_per_worker": batch_size, **found}))


def _worker(rank: int, workers: int, pickled: bytes, folder: str) -> None:
    torch.set_num_threads(1)
    job: TrainJob = cloudpickle.loads(pickled)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers
    )
    model: Any = job.build()
    assert isinstance(job.step, JointStep)
    batches = job.make_batches(WorkerContext(rank, workers, 0, job.training.steps, local_blocks))
    counted: Counter[str] = Counter()
    formula: Counter[str] = Counter()
    number, seconds = 0, 0.0
    for batch in islice(batches, job.training.steps):
        state = job.before_step(model, number, StepState(progress=number / job.training.steps))
        with torch.autocast("cpu", torch.bfloat16, job.training.precision == "bfloat16"):
            begun = time.process_time()
            counts, sizes = counted_step(model, job.step, batch, state)
            seconds += time.process_time() - begun if number else 0.0
        counted += counts
        formula += Counter(sizes.bytes())
        number += 1
    all_seconds = float(global_sum(torch.tensor(seconds, dtype=torch.float64)))
    windows = job.training.batch_size * (number - 1)
    if rank == 0:
        means = {
            "counted": {name: total // number for name, total in counted.items()},
            "formula": {name: total // number for name, total in formula.items()},
            "counted_bytes": sum(counted.values()) // number,
            "formula_bytes": sum(formula.values()) // number,
            "windows_per_core_second": round(windows / all_seconds, 1),
            "last_step": vars(sizes),
        }
        Path(folder, "found.json").write_text(json.dumps(means))
    dist.barrier()
    os._exit(0)  # a thread of gloo may outlive the interpreter's own end (pytorch#179291)


if __name__ == "__main__":
    cli.run(main)

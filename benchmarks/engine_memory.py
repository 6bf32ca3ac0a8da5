"""Peak memory of a step against its number of users, whole and by the gradient cache.

Every point runs in a process of its own: what one step leaves in the heap is no part of the next.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_workload import Workload, merged, print_line
from karma_ray.training.gradient_cache import narrow
from karma_ray.training.step import JointStep

SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
MICRO_BATCH = 32


def memory(work: Workload, arguments: Namespace) -> None:
    """Peak memory against the number of users; no point is started that would not fit."""
    sizes = SIZES[:3] if arguments.quick else SIZES
    ways = {"whole": 0, "gradient_cache": MICRO_BATCH}
    peaks: dict[str, dict[int, float]] = {way: {} for way in ways}
    available = sum(batch.num_windows for batch in work.batches)
    for size in (size for size in sizes if size <= available):
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "batch.safetensors")
            whole = merged(work.batches)
            part, _ = narrow(whole, torch.arange(size))
            replace(work, batches=[part]).save(file)
            for way, micro in ways.items():
                expected = 2 * max(peaks[way].values(), default=0.0)
                if expected > arguments.limit_gib:
                    print_line(
                        {"way": way, "users": size, "skipped_expected_gib": round(expected, 2)}
                    )
                    continue
                point = _in_a_process(file, micro, arguments)
                peaks[way][size] = point["peak_gib"]
                print_line({"way": way, **point})
    if arguments.plot:
        _plot(peaks, arguments.plot)
    shared = max(set(peaks["whole"]) & set(peaks["gradient_cache"]))
    ratio = peaks["whole"][shared] / peaks["gradient_cache"][shared]
    headline = {f"{way}_peak_gib": round(found[shared], 3) for way, found in peaks.items()}
    print_line({"users": shared, **headline, "whole_over_gradient_cache": round(ratio, 2)})


def memory_point(work: Workload, micro_batch_size: int) -> dict[str, Any]:
    """Peak of one forward and backward pass above model and gradients, in this process."""
    model, batch = work.build(), work.batches[0]
    step = JointStep(work.config.objective, micro_batch_size=micro_batch_size)
    few, _ = narrow(batch, torch.arange(min(4, batch.num_windows), device=work.device))
    for part, micro in ((few, 0), (batch, micro_batch_size)):
        model.zero_grad(set_to_none=False)
        before = forget_peak(work)
        started = time.perf_counter()
        output = work.forward(model, replace(step, micro_batch_size=micro), part)
        if output.loss.requires_grad:
            torch.autograd.backward(output.loss)
        work.finish()
        seconds = time.perf_counter() - started
    return {
        "micro_batch_size": micro_batch_size,
        "peak_gib": round(peak_gib(work) - before, 4),
        "base_gib": round(before, 3),
        "examples_per_s": round(batch.num_windows / seconds, 2),
        **work.facts(),
    }


def _in_a_process(file: str, micro: int, arguments: Namespace) -> dict[str, Any]:
    engine = Path(__file__).with_name("engine.py")
    command = [sys.executable, str(engine), "memory-point", "--batches", file,
               "--micro-batch-size", str(micro), "--shape", arguments.shape,
               "--layers", str(arguments.layers), "--users", "-1",
               "--threads", str(torch.get_num_threads())]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def forget_peak(work: Workload) -> float:
    """GiB in use now; the peak counts from here."""
    if work.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    Path("/proc/self/clear_refs").write_text("5")
    return _status_gib("VmRSS")


def peak_gib(work: Workload) -> float:
    if work.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return _status_gib("VmHWM")


def _status_gib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) / 2**20


def _plot(peaks: dict[str, dict[int, float]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for way, found in peaks.items():
        axes.plot(list(found), list(found.values()), marker="o", label=way.replace("_", " "))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
    axes.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    axes.set(xlabel="users of a step", ylabel="peak above model and gradients, GiB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)

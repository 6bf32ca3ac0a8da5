"""Is the joint step right and fast on this machine's GPU? One command, a few minutes, JSON lines.

    python benchmarks/gpu_check.py [--minutes 4] [--device cuda|cpu] [--parts LIST]

It needs PyTorch, transformers, pyarrow and pydantic, but no Ray, Polars, Faiss, data or network.
Parts, each one or more lines `{"part": ...}` that are printed as soon as they are known:

machine    versions, device, measured peaks of matrix products and of copies
equality   loss and gradients of a small step against the CPU in float32, packed and padded
first_step seconds from the start of a process to the end of its first step
step       seconds, tokens/s and MFU (of the measured bfloat16 peak) by shape and batch size
kernels    the 15 longest kernels, launches, idle share of the device, waits of the host
encode     items encoded a second; requests a second
compiled   some steps again with compiled layers (not on a CPU unless --parts names it)

A part that would begin after its time is skipped with a line that says so; what runs at the end of
the minutes is cut. The line `end` repeats what compares machines and versions: HEADLINE, of the
SmolLM2-135M pair and 64 users. Without a GPU the shapes are tiny and the whole takes seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import transformers
from torch import Tensor

from benchmarks.gpu_first_step import seconds_to_first_step
from benchmarks.gpu_profile import profile_step
from benchmarks.gpu_workload import (
    OBJECTIVE,
    SMALL,
    Check,
    Size,
    build_model,
    gradient,
    make_batch,
    prepared,
    request_batch,
    train,
    vocabulary,
)
from karma_ray.data.batch import Batch
from karma_ray.model import packing
from karma_ray.model.karma import KarmaModel
from karma_ray.retrieval.encode import autocast, encode_catalog
from karma_ray.training.flops import joint_flops
from karma_ray.training.placement import bodies
from karma_ray.training.step import JointStep
from karma_ray.training.step_state import AT_THE_END

GPU_POINTS = [
    ("smollm2-135m", 16), ("smollm2-135m", 64), ("smollm2-135m", 256),
    ("qwen3-0.6b", 16), ("qwen3-0.6b", 64), ("qwen3-0.6b+1.7b", 16), ("qwen3-0.6b+1.7b", 64),
]  # fmt: skip
"""Shape and users a step."""
COMPILED_POINTS = [("smollm2-135m", 64), ("qwen3-0.6b", 64)]
CPU_POINTS = [("tiny", 4), ("tiny", 8)]
EQUAL = {"float32": (1e-5, 1e-3), "bfloat16": (0.02, 0.2)}
"""Relative differences of loss and gradients up to which a step counts as equal."""


def main(argv: list[str] | None = None) -> int:
    """Run the parts; returns 1 if any failed."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--minutes", type=float, default=4.0, help="end after so long (default 4)")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    flags.add_argument("--device", choices=["cuda", "cpu"], default=found, help="default: a GPU")
    flags.add_argument("--parts", help="commas between them (default: all)")
    arguments = flags.parse_args(argv)
    started, seconds = time.monotonic(), 60 * arguments.minutes
    check = Check(torch.device(arguments.device), started + seconds)
    usual = [name for name in PARTS if name != "compiled" or check.on_gpu]
    wanted = arguments.parts.split(",") if arguments.parts else usual
    if unknown := set(wanted) - set(PARTS):
        flags.error(f"--parts {','.join(sorted(unknown))} is unknown; choose from {list(PARTS)}")
    watch = threading.Timer(seconds, _cut, [check])
    watch.daemon = True
    watch.start()
    for name in ["machine", *(name for name in PARTS if name in wanted and name != "machine")]:
        PARTS[name](check)
    watch.cancel()
    check.say_end(seconds=round(time.monotonic() - started, 1))
    return 1 if check.failed else 0


def _cut(check: Check) -> None:
    check.say_end(cut="the minutes are over")
    os._exit(1 if check.failed else 0)


def machine(check: Check) -> None:
    """Versions, device, and the peaks that other lines refer to."""
    facts: dict[str, Any] = {"device": "cpu", "threads": torch.get_num_threads()}
    if check.on_gpu:
        shown = torch.cuda.get_device_properties(check.device)
        free, _ = torch.cuda.mem_get_info()
        facts = {"device": shown.name, "capability": f"{shown.major}.{shown.minor}",
                 "memory_gib": round(shown.total_memory / 2**30, 1),
                 "free_gib": round(free / 2**30, 1)}  # fmt: skip
    size = 8192 if check.on_gpu else 256
    for name, kind in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        left, right = (torch.randn(size, size, device=check.device).to(kind) for _ in range(2))
        times = 1e9
        for _ in range(3):
            times = min(times, check.seconds_of(lambda a=left, b=right: a @ b, 3))
        check.peaks[name] = 2.0 * size**3 / times
    large = torch.empty(2**28 if check.on_gpu else 2**20, device=check.device)
    bandwidth = 2 * large.nbytes / check.seconds_of(large.clone)
    check.say(
        "machine", torch=torch.__version__, transformers=transformers.__version__, **facts,
        matmul_tflops={name: round(peak / 1e12, 3) for name, peak in check.peaks.items()},
        copy_gb_per_s=round(bandwidth / 1e9, 2),
    )  # fmt: skip


def equality(check: Check) -> None:
    """Loss and gradients of one step here and on the CPU, from the same weights."""
    shape, layers = ("smollm2-135m", 4) if check.on_gpu else ("tiny", 0)
    batch = make_batch(SMALL, vocabulary(shape), check.seed)
    exact: dict[str, tuple[float, Tensor]] = {}

    def reference() -> None:
        exact["cpu"] = _gradients(build_model(shape, torch.device("cpu"), layers), batch, False)

    def compare(packed: bool, half: bool) -> None:
        model = build_model(shape, torch.device("cpu"), layers).to(check.device)
        real = packing.worth_packing if packed else lambda real: False
        with patch.object(packing, "worth_packing", real):
            loss, found = _gradients(model, batch.to(check.device), half)
        expected, wanted = exact["cpu"]
        difference, precision = (found - wanted).abs(), "bfloat16" if half else "float32"
        apart = abs(loss - expected) / abs(expected), float(difference.norm() / wanted.norm())
        equal = all(a <= most for a, most in zip(apart, EQUAL[precision], strict=True))
        check.headline["equal"] = equal and check.headline["equal"] is not False
        check.say(
            "equality", shape=shape, packed=packed, precision=precision, equal=equal,
            variable_length_attention=packed and half and check.on_gpu, loss=loss,
            loss_difference=apart[0], largest_difference=float(difference.max()),
            largest_gradient=float(wanted.abs().max()), relative_difference=apart[1],
        )  # fmt: skip

    check.attempt("equality", 15, reference, where="cpu")
    for packed, half in ((True, False), (False, False), (True, True), (False, True)):
        facts = {"packed": packed, "half": half}
        check.attempt("equality", 10, lambda p=packed, h=half: compare(p, h), **facts)


def _gradients(model: KarmaModel, batch: Batch, half: bool) -> tuple[float, Tensor]:
    kind = batch.step_mask.device.type
    with torch.autocast(kind, torch.bfloat16) if half else nullcontext():
        output = JointStep(OBJECTIVE)(model, batch, AT_THE_END)
    torch.autograd.backward(output.loss)
    return float(output.loss.detach()), gradient(model)


def steps(check: Check, *, compiled: bool = False) -> None:
    """The joint step of every shape and batch size, through `fit`, from batches on the CPU."""
    part, points = "compiled" if compiled else "step", GPU_POINTS if check.on_gpu else CPU_POINTS
    if compiled:
        points = COMPILED_POINTS if check.on_gpu else CPU_POINTS[:1]
    for shape, users in points:
        facts = {"shape": shape, "users": users}
        needs = 60.0 if compiled else 20.0
        check.attempt(
            part, needs if check.on_gpu else 1.0,
            lambda s=shape, u=users: _measure(check, part, s, u, compiled), **facts,
        )  # fmt: skip


def _measure(check: Check, part: str, shape: str, users: int, compiled: bool) -> None:
    model, batches, step = prepared(check, shape, users)
    before = time.perf_counter()
    if compiled:
        for body in bodies(model):
            for layer in body.layers:
                layer.compile(dynamic=True)
    if check.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    limit = min(8.0, check.left() / 3) if check.on_gpu else 0.5
    found = train(model, step, batches, limit, 12)
    whole = time.perf_counter() - before
    seconds = statistics.median(found)
    flops = statistics.mean(
        joint_flops(model, batch, OBJECTIVE.built, encoder="full") for batch in batches
    )
    tokens = statistics.mean(batch.num_tokens for batch in batches)
    mfu = round(flops / seconds / check.peaks["bfloat16"], 4)
    if (shape, users) == _headline_point(check):
        check.headline["mfu_compiled" if compiled else "mfu"] = mfu
    facts: dict[str, Any] = {}
    if check.on_gpu:
        facts["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    check.say(
        part, shape=shape, users=users, steps=len(found), seconds=round(seconds, 5),
        spread=[round(min(found), 5), round(max(found), 5)], tokens_per_s=round(tokens / seconds),
        tokens=round(tokens), tflop=round(flops / 1e12, 4),
        mfu=mfu, whole_seconds=round(whole, 1), micro_batch_size=step.micro_batch_size,
        micro_tokens=step.micro_tokens, **facts,
    )  # fmt: skip


def _headline_point(check: Check) -> tuple[str, int]:
    """The shape and users of which the last line speaks."""
    return (COMPILED_POINTS if check.on_gpu else CPU_POINTS)[0]


def first_step(check: Check) -> None:
    """Seconds from the start of a process to the end of its first step."""
    shape, users = _headline_point(check)

    def run() -> None:
        found = seconds_to_first_step(check, shape, users)
        check.headline["seconds_to_first_step"] = found["whole"]
        check.say("first_step", shape=shape, users=users, seconds=found)

    check.attempt("first_step", 30 if check.on_gpu else 10, run, shape=shape, users=users)


def kernels(check: Check) -> None:
    """A profile of one shape's step."""
    shape, users = _headline_point(check)

    def run() -> None:
        model, batches, step = prepared(check, shape, users)
        found = profile_step(model, step, batches)
        check.headline["host_gap_share"] = found.get("device_idle_share")
        check.say("kernels", shape=shape, users=users, **found)

    check.attempt("kernels", 25 if check.on_gpu else 1, run, shape=shape, users=users)


def encode(check: Check) -> None:
    """Items encoded a second as a catalogue is, and interests of requests a second."""
    for shape in ["smollm2-135m", "qwen3-0.6b"] if check.on_gpu else ["tiny"]:
        check.attempt("encode", 10 if check.on_gpu else 1, lambda s=shape: _encode(check, s))


def _encode(check: Check, shape: str) -> None:
    model = build_model(shape, check.device)
    many = Size(256 if check.on_gpu else 4)
    batch = make_batch(many, vocabulary(shape), check.seed)
    tokens, lengths = batch.item_tokens.numpy(), batch.item_lengths.numpy()
    for size in (256, 2048):
        arguments = (np.ascontiguousarray(tokens), lengths, size, "bfloat16")
        seconds = check.seconds_of(lambda a=arguments: encode_catalog(model.interest, *a), 1)
        speed = round(float(lengths.sum()) / seconds)
        if shape == _headline_point(check)[0]:
            check.headline["encode_tokens_per_s"] = max(
                speed, check.headline["encode_tokens_per_s"] or 0
            )
        check.say(
            "encode", shape=shape, items=len(lengths), batch_size=size,
            items_per_s=round(len(lengths) / seconds, 1), tokens_per_s=speed,
        )  # fmt: skip
    model.eval()
    for users in (1, 64):
        requests = request_batch(make_batch(replace(many, users=users), vocabulary(shape)))
        requests = requests.to(check.device)
        items = torch.randn(len(requests.item_rows), model.interest.width, device=check.device)
        with torch.inference_mode(), autocast(check.device, "bfloat16"):
            seconds = check.seconds_of(lambda r=requests, i=items: model.interest.interest(r, i))
        check.say("encode", shape=shape, users=users, requests_per_s=round(users / seconds, 1))


def compiled(check: Check) -> None:
    """The steps again with compiled layers; last, since compiling cannot be interrupted."""
    steps(check, compiled=True)


PARTS: dict[str, Callable[[Check], None]] = {
    "machine": machine,
    "equality": equality,
    "first_step": first_step,
    "step": steps,
    "kernels": kernels,
    "encode": encode,
    "compiled": compiled,
}

if __name__ == "__main__":
    sys.exit(main())

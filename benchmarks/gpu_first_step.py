"""Seconds from the start of a fresh process to the end of its first training step, without Ray.

`gpu_check.py` takes that step in a process of its own, because imports, the device's context and
first allocations happen once in a process.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu_workload import Check, prepared, train

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "import sys; from benchmarks.gpu_first_step import take; take(*sys.argv[1:])"


def take(device: str, shape: str, users: str) -> None:
    """Take one step, and print the time at which each part of the way was done."""
    reached = {"imports": time.time()}
    model, batches, step = prepared(Check(torch.device(device), math.inf), shape, int(users))
    reached["model"] = time.time()
    train(model, step, batches, 0.0, 1)
    reached["step"] = time.time()
    print(json.dumps(reached))


def seconds_to_first_step(check: Check, shape: str, users: int) -> dict[str, float]:
    """Seconds that a new process takes for `imports`, `model` and `step`, and the `whole`."""
    arguments = [str(check.device), shape, str(users)]
    begun = before = time.time()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=check.left() - 2,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-400:])
    found = {}
    for part, reached in json.loads(done.stdout.splitlines()[-1]).items():
        found[part], before = round(reached - before, 2), reached
    return {**found, "whole": round(before - begun, 2)}

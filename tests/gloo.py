"""Real worker processes over gloo, for what many workers must agree on."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

Worker = Callable[..., dict[str, Any]]
"""rank -> what it found; a function of a module, for it is sent to another process."""

# Imports take a process seconds and its work milliseconds: one process imports, and each worker is
# a fork of it. Not of this one, whose threads (those of Ray, if a test has started it) are lost
# in a fork while their locks stay taken.
IMPORTED = [
    "torch.distributed.fsdp", "karma_ray.model.karma", "karma_ray.training.loop",
    "karma_ray.training.placement", "karma_ray.runs.worker",
]  # fmt: skip


def import_once() -> str:
    """The start method of processes that have imported the model already."""
    forkserver.set_forkserver_preload(IMPORTED)
    return "forkserver"


def start_workers(worker: Callable[..., object], size: int, *arguments: Any) -> None:
    """`worker(rank, *arguments)` in `size` processes; returns when all have ended."""
    multiprocessing.start_processes(worker, args=arguments, nprocs=size, start_method=import_once())


def run_workers(worker: Worker, size: int, *arguments: Any) -> list[dict[str, Any]]:
    """`worker(rank, *arguments)` in `size` processes of one thread; what each found."""
    with tempfile.TemporaryDirectory() as folder:
        start_workers(_run, size, folder, size, worker, arguments)
        return [torch.load(Path(folder) / f"rank-{rank}.pt") for rank in range(size)]


def _run(rank: int, folder: str, size: int, worker: Worker, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    torch.save(worker(rank, *arguments), f"{folder}/rank-{rank}.pt")
    leave()


def leave() -> NoReturn:
    """End a worker process that has nothing left to do.

    Without the interpreter's own end: a thread of gloo that still holds a finished collective
    frees its tensors then, finds no interpreter, and aborts the process (pytorch#179291).
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

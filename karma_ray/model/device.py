"""The device of a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch

_GPUS = ContextVar("gpus", default=True)


def this_device(device: torch.device | str | None = None) -> torch.device:
    """Return `device`, or if it is None the GPU of this process, or else the CPU."""
    cuda = may_use_gpus() and torch.cuda.is_available()
    return torch.device(device or ("cuda" if cuda else "cpu"))


def may_use_gpus() -> bool:
    """Whether what is computed now may use a GPU."""
    return _GPUS.get()


@cache
def cpu_computes_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for products of bfloat16 (Linux; else False)."""
    found = Path("/proc/cpuinfo")
    flags = set(found.read_text(encoding="utf-8").split()) if found.exists() else set()
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16"})


@contextmanager
def using_gpus(allowed: bool) -> Iterator[None]:
    """While inside, use GPUs only if `allowed`."""
    before = _GPUS.set(allowed)
    try:
        yield
    finally:
        _GPUS.reset(before)

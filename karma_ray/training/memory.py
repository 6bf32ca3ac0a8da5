"""Memory of a worker: freed memory of the C library, and what fits into that of a GPU."""

from __future__ import annotations

import ctypes
from typing import Any, cast

import torch
from torch import nn

from karma_ray.model.backbone import num_layers
from karma_ray.model.backbones.registry import family_of

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt(3)
_LARGE = 2**30
ON_A_CPU, FEWEST = 16_384, 1024
"""Tokens at once where memory is not asked for, and at least."""
SHARE_USED = 0.5
"""Of a GPU's free memory, as the estimate is rough and the backward pass needs some beside it."""


def keep_heap() -> bool:
    """Let glibc keep freed memory for the next step; returns False without this C library.

    By default large tensors are mapped and unmapped in every step, which costs page faults.
    `trim_heap` returns what accumulates.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    return tune is not None and bool(
        tune(_MMAP_THRESHOLD, _LARGE) and tune(_TRIM_THRESHOLD, 2 * _LARGE - 1)
    )


def trim_heap() -> bool:
    """Return the free pages of glibc's heap; returns False where the C library cannot.

    The shapes of batches vary from step to step, and glibc keeps the resulting holes: on the toy
    shop a worker used 2.7 GB after 160 steps, of which 1.4 GB were holes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True


def tokens_at_once(body: nn.Module, num_frozen: int, device: torch.device) -> int:
    """Return how many tokens a body can process at once, with what its backward pass needs.

    A layer keeps about two numbers of the compute type for each input and each output of its
    products. Layers below `num_frozen` keep nothing.
    """
    free = _free_bytes(device)
    if free is None:
        return ON_A_CPU
    shape = family_of(body).layer_shape(cast(Any, body).config)
    kept = 4 * sum(inside + outside for inside, outside in shape.matrices)
    layers = max(1, num_layers(body) - num_frozen)
    return max(FEWEST, int(SHARE_USED * free / (kept * layers)))


def _free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a GPU, with what PyTorch holds without using it."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

"""Sharded tensors (FSDP2's DTensor), of which every worker holds some rows, and plain tensors.

Only `Shard(0)` over one mesh dimension, which is what `fully_shard` makes: worker r of N holds
rows `r * c` to `(r + 1) * c` with c = ceil(rows / N), the last ones fewer or none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this worker holds only some rows."""
    return any(placement.is_shard() for placement in getattr(tensor, "placements", ()))


def local_part(tensor: Any) -> Tensor:
    """Return this worker's rows of a sharded tensor, or a plain tensor itself; no gradient."""
    tensor = tensor.detach()
    # A replicated DTensor also holds all its rows here.
    local: Tensor = tensor.to_local() if hasattr(tensor, "placements") else tensor
    return local


def whole(tensor: Any) -> Tensor:
    """Return all rows; this is a collective when the tensor is a DTensor."""
    tensor = tensor.detach()
    complete: Tensor = tensor.full_tensor() if hasattr(tensor, "placements") else tensor
    return complete


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `target`, or this worker's rows of it."""
    local_part(target).copy_(_rows_of(target, value))


def placed_like(target: Tensor, value: Tensor) -> Tensor:
    """Copy a whole tensor, distributed like `target` if it has the same shape."""
    if not hasattr(target, "placements") or value.shape != target.shape:
        return value.clone()
    from torch.distributed.tensor import DTensor

    described: Any = target
    placed: Tensor = DTensor.from_local(
        _rows_of(target, value).to(described.to_local().device, copy=True),
        described.device_mesh,
        described.placements,
        run_check=False,
        shape=target.shape,
        stride=target.stride(),
    )
    return placed


def _rows_of(target: Any, value: Tensor) -> Tensor:
    if not is_sharded(target):
        return value
    (placement,) = target.placements
    assert placement.is_shard(0), f"{placement} is not a split of the rows"
    rows, workers = value.shape[0], target.device_mesh.size()
    size = -(-rows // workers)
    start = min(rows, target.device_mesh.get_local_rank() * size)
    return value[start : min(rows, start + size)]

"""Tensors of which every worker holds some rows (FSDP2's DTensor), beside plain ones.

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
    """This worker's rows of a sharded tensor, a plain tensor as it is; without gradient."""
    tensor = tensor.detach()
    # A replicated DTensor, too, holds all its rows here.
    local: Tensor = tensor.to_local() if hasattr(tensor, "placements") else tensor
    return local


def whole(tensor: Any) -> Tensor:
    """All rows; a collective when the tensor is a DTensor."""
    tensor = tensor.detach()
    complete: Tensor = tensor.full_tensor() if hasattr(tensor, "placements") else tensor
    return complete


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `target`, or this worker's rows of it."""
    local_part(target).copy_(_rows_of(target, value))


def placed_like(target: Tensor, value: Tensor) -> Tensor:
    """A copy of a whole tensor, distributed as `target` when it has its shape."""
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

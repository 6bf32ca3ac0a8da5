"""Data parallelism without a wrapper: global counts, gathers with gradient, summed gradients.

Every loss is this worker's sum divided by a *global* count, so gradients are summed over workers:
one worker and N workers take the same step on the same global batch. Without an initialised
process group every function here is the identity.

Legend: n rows of this worker (may differ between workers), R rows of all workers, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from karma_ray.training.checkpoints.shards import is_sharded

BUCKET_ELEMENTS = 8 * 1024 * 1024


def is_parallel() -> bool:
    """Whether a process group of more than one worker is initialised."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return this worker's number, or 0 without a process group."""
    return dist.get_rank() if is_parallel() else 0


def world_size() -> int:
    """Return the number of workers, or 1 without a process group."""
    return dist.get_world_size() if is_parallel() else 1


def barrier() -> None:
    """Wait for every worker."""
    if is_parallel():
        dist.barrier()


def global_sum(value: Tensor) -> Tensor:
    """Sum `value` over the workers, elementwise and without gradient."""
    total = value.detach().clone()
    if is_parallel():
        dist.all_reduce(total)
    return total


def global_max(value: Tensor) -> Tensor:
    """Return the maximum of `value` over the workers, elementwise and without gradient."""
    largest = value.detach().clone()
    if is_parallel():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def row_counts(num_rows: int, device: torch.device | str = "cpu") -> list[int]:
    """Return the number of rows of every worker, in rank order."""
    if not is_parallel():
        return [num_rows]
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = num_rows
    dist.all_reduce(counts)
    return [int(count) for count in counts.tolist()]


def row_offset(counts: Sequence[int]) -> int:
    """Return the index of this worker's first row among the gathered ones."""
    return sum(counts[: rank()])


def all_gather_ints(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Concatenate integer rows of all workers in rank order; no gradient. [n, ...] -> [R, ...]."""
    if not is_parallel():
        return rows
    counts = row_counts(rows.shape[0], rows.device) if counts is None else counts
    return _gather(rows, counts)


def all_gather_rows(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Concatenate rows of all workers in rank order, with gradient. [n, D] -> [R, D].

    The gradient of a row is the sum of the gradients that *every* worker computes for it, because
    each worker's loss may use rows of the others as negatives. The backward pass is a
    collective: each worker's loss must depend on the result (multiplied by zero if necessary).
    """
    if not is_parallel():
        return rows
    counts = row_counts(rows.shape[0], rows.device) if counts is None else counts
    gathered: Tensor = _GatherRows.apply(rows, list(counts))  # type: ignore[no-untyped-call]
    return gathered


def broadcast_parameters(model: nn.Module) -> None:
    """Copy rank 0's parameters and buffers to every worker."""
    if is_parallel():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """All-reduce (sum) the gradients in flat buckets.

    A parameter without a gradient on this worker contributes zeros; one without a gradient on
    any worker keeps None, so that the optimiser skips it as with a single worker.
    """
    if not is_parallel():
        return
    # Gradients of sharded parameters were already summed by the reduce-scatter.
    trained = [p for p in parameters if p.requires_grad and not is_sharded(p)]
    if not trained:
        return
    present = torch.tensor(
        [parameter.grad is not None for parameter in trained],
        dtype=torch.int32,
        device=trained[0].device,
    )
    dist.all_reduce(present)
    reduced = [p for p, count in zip(trained, present.tolist(), strict=True) if count > 0]
    for bucket in _buckets(reduced):
        flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in bucket])
        dist.all_reduce(flat)
        pieces = torch.split(flat, [parameter.numel() for parameter in bucket])
        for parameter, piece in zip(bucket, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        other = bucket and bucket[0].dtype != parameter.dtype
        if bucket and (other or size + parameter.numel() > BUCKET_ELEMENTS):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket


def _gather(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Pad to the largest worker, gather, and remove the padding. [n, ...] -> [R, ...]."""
    largest = max(counts)
    padded = rows.new_zeros((largest, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    received = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(received, padded)
    return torch.cat([part[:count] for part, count in zip(received, counts, strict=True)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return _gather(rows.detach().contiguous(), counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        # Summed in float32, because half-precision sums over many workers lose bits.
        total = gradient.to(torch.float32, copy=True).contiguous()
        dist.all_reduce(total)
        start = row_offset(ctx.counts)
        own = total[start : start + ctx.counts[rank()]]
        return own.to(gradient.dtype), None

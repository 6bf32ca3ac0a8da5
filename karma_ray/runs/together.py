"""What all workers of a training do together: encode the catalogue, and rank it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from karma_ray.evaluation.measurement import ALONE, Workers
from karma_ray.retrieval.encode import CPU_BATCH, GPU_SLOTS, encode_catalog
from karma_ray.training.parallel import (
    all_gather_rows,
    global_sum,
    is_parallel,
    rank,
    world_size,
)
from karma_ray.training.placement import needs_all_workers


def encode_together(
    model: nn.Module,
    tokens: NDArray[Any],  # [I, L]
    lengths: NDArray[Any],  # [I]
    precision: str,
    encode: Callable[..., torch.Tensor] | None = None,
) -> NDArray[np.float32]:  # [I, D]
    """Encode every item, of which each worker takes an equal share; all get the whole result.

    A collective: all workers call it. Alone it is `encode_catalog`, which has the arguments.
    """
    if not is_parallel():
        return encode_catalog(model, tokens, lengths, precision=precision, encode=encode)
    device = next(model.parameters()).device
    order = np.argsort(lengths, kind="stable")
    share = -(-len(order) // world_size())
    # Dealt out in the order of lengths, so that all shares take as long. The last items stand in
    # for missing ones: a pass through sharded layers needs all workers, so all make as many.
    padded = np.pad(order, (0, share * world_size() - len(order)), mode="edge")
    mine = padded[rank() :: world_size()]
    size = None
    if needs_all_workers(model):
        longest = max(1, int(lengths.max()))
        size = CPU_BATCH if device.type == "cpu" else max(1, GPU_SLOTS // longest)
    vectors = encode_catalog(model, tokens[mine], lengths[mine], size, precision, mine, encode)
    gathered = all_gather_rows(torch.from_numpy(vectors).to(device), [share] * world_size()).cpu()
    shares = gathered.numpy().reshape(world_size(), share, -1)
    dealt = shares.swapaxes(0, 1).reshape(world_size() * share, -1)[: len(order)]
    result = np.empty_like(dealt)
    result[order] = dealt
    return result


def ranking_workers(model: nn.Module) -> Workers:
    """Return the workers of this training for an evaluation; they exchange on the model's device.

    Alone it is this process.
    """
    device = next(model.parameters()).device

    def add(values: NDArray[Any]) -> NDArray[Any]:
        return global_sum(torch.from_numpy(values).to(device)).cpu().numpy()

    return Workers(rank(), world_size(), add) if is_parallel() else ALONE

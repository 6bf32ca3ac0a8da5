"""Placement of a model on a worker: device, activation checkpointing, compilation, sharding.

`shard` applies FSDP2 to the transformer layers, which hold nearly all weights of a large model:
each worker keeps 1/N of their weights, gradients and moments, and gathers a layer while it runs.
Token embeddings, heads and adapters are used outside the bodies' forward passes and stay whole
on every worker; their gradients are summed as under `replicate`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from karma_ray.errors import InputError
from karma_ray.model.backbone import has_vision
from karma_ray.training.checkpoints.shards import is_sharded, local_part
from karma_ray.training.config import TrainingConfig
from karma_ray.training.parallel import broadcast_parameters, global_sum, is_parallel, world_size


def place(model: nn.Module, training: TrainingConfig, device: torch.device) -> nn.Module:
    """Move the model to the device and apply `training`, with rank 0's weights on all workers."""
    model = model.to(device)
    broadcast_parameters(model)
    for body in bodies(model):
        if training.activation_checkpointing:
            _keep_layer_inputs(body)
        if training.compile:
            for layer in body.layers:
                layer.compile(dynamic=True)
        if training.parallelism == "shard" and is_parallel():
            _shard(body, training.precision, device)
    return model


def _keep_layer_inputs(body: Any) -> None:
    """Enable activation checkpointing, by the name that the installed transformers uses."""
    renamed = getattr(body, "activation_checkpointing_enable", None)
    enable = renamed or body.gradient_checkpointing_enable  # its name before transformers 5.22
    enable({"use_reentrant": False})


def bodies(model: nn.Module) -> list[Any]:
    """Return the Hugging Face bodies in a model, which have token embeddings and layers."""
    return [part for part in model.modules() if hasattr(part, "embed_tokens")]


def needs_all_workers(model: nn.Module) -> bool:
    """Whether a forward pass of this model needs all workers."""
    return any(isinstance(part, FSDPModule) for part in model.modules())


def clip_gradients(model: nn.Module, bound: float) -> Tensor:
    """Scale all gradients to a global norm of at most `bound`; returns the previous norm."""
    trained = [value for value in model.parameters() if value.grad is not None]
    if not any(is_sharded(value) for value in trained):
        return nn.utils.clip_grad_norm_(trained, bound)
    gradients = [cast(Tensor, value.grad) for value in trained]
    device = gradients[0].device
    whole, shares = torch.zeros((), device=device), torch.zeros((), device=device)
    for gradient in gradients:
        square = local_part(gradient).float().square().sum()
        if is_sharded(gradient):
            shares += square
        else:
            whole += square
    norm = (whole + global_sum(shares)).sqrt()
    factor = (bound / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local_part(gradient).mul_(factor)
    return norm


def _shard(body: Any, precision: str, device: torch.device) -> None:
    if has_vision(body):  # a worker without a picture in a step would skip the vision tower
        raise InputError("training.parallelism", "shard", "is not for a multimodal item encoder")
    mesh = init_device_mesh(device.type, (world_size(),))
    # On a CPU autocast does the casting, as without sharding.
    half = precision == "bfloat16" and device.type == "cuda"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    for layer in body.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(body, mesh=mesh, mp_policy=policy, ignored_params={body.embed_tokens.weight})
    for part in body.modules():
        if isinstance(part, FSDPModule):
            # Losses are shares of a global mean, so gradients are summed, not averaged.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)

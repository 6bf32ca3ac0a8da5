"""The collectives of Ray Train's workers: NCCL if all of them have CUDA, and otherwise Gloo.

A module of its own, because Ray Train's controller, which starts before the workers, imports it:
it must not load the model behind `training.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from karma_ray.runs.run_log import note_start


class _Backend(_TorchBackend):
    """Chooses NCCL if all workers have CUDA.

    The process that starts the workers cannot know it: it may run on a machine without GPUs, and a
    worker's GPU may be one in name only.
    """

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        config: Any = backend_config  # Collectives
        note_start(config.run, config.stage, worker_group.execute(_machine))
        has_gpus = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        on_cuda = has_gpus and all(worker_group.execute(torch.cuda.is_available))
        backend = "nccl" if on_cuda else "gloo"
        super().on_start(worker_group, replace(backend_config, backend=backend))


@dataclass
class Collectives(TorchConfig):
    """Ray Train's configuration of PyTorch's process group."""

    run: str = ""
    stage: str = ""

    @property
    def backend_cls(self) -> type[_Backend]:
        """What starts the group."""
        return _Backend


def _machine() -> str:
    """Return the address of the machine of this worker."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return next(str(n["NodeManagerAddress"]) for n in ray.nodes() if n["NodeID"] == here)

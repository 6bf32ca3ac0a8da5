"""Configuration of pretraining, warm-up and joint training."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from karma_ray.ranges import Count, CountOrZero, Positive, Share, ShareBelowOne, Weight


@dataclass(frozen=True)
class PretrainConfig:
    """Causal language modelling on the catalogue's text, in place of a pretrained LLM."""

    steps: CountOrZero = 400
    """Optimiser steps; 0 keeps the random initialisation."""
    batch_size: Count = 64
    """Items per step."""
    learning_rate: Weight = 2e-3
    """Peak learning rate."""


@dataclass(frozen=True)
class WarmupConfig:
    """Stage 1: CE(text | P(e_i)), item data only."""

    skip: bool = False
    """Start the joint stage without the warm-up, as a control."""
    steps: Count = 400
    """Largest number of steps; the warm-up ends earlier when the shuffled gap stops growing."""
    batch_size: Count = 64
    """Items per step."""
    learning_rate: Weight = 1e-3
    """Peak learning rate of the decoder; for new modules it is multiplied by `new_module_lr`."""
    train: Literal["decoder", "adapters_only", "all"] = "decoder"
    """What is trained: the decoder and the adapters, only the adapters, or all modules."""


@dataclass(frozen=True)
class TrainingConfig:
    """Stage 2, joint training."""

    steps: Count = 1000
    """Optimiser steps."""
    batch_size: Count = 16
    """User windows per step, over all workers."""
    learning_rate: Weight = 1e-3
    """Peak learning rate of the backbones."""
    new_module_lr: Weight = 2.0
    """Factor on the learning rate of new modules (projector, read-out, query embedding)."""
    lr_warmup_share: Share = 0.05
    """Share of the steps with a linearly rising learning rate; cosine decay follows."""
    weight_decay: Weight = 0.01
    """AdamW weight decay on matrices."""
    grad_clip: Positive = 1.0
    """Upper bound of the global gradient norm."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type; master weights and losses are always float32."""
    encoder_grad: Literal["full", "targets_only", "head", "frozen"] = "full"
    """Where the item encoder gets gradients: everywhere; from targets and negatives only; in its
    head W_e alone, for which all items' pooled states are computed once; nowhere."""
    encoder_delay: ShareBelowOne = 0.0
    """Share of the steps in which the item encoder is frozen while the user decoder learns to
    use its embeddings (gradual unfreezing, 1801.06146)."""
    encoder_lr: Weight = 1.0
    """Factor on the learning rates of the item encoder, including its new modules."""
    bank_refresh_steps: Count = 100
    """Steps between refreshes of the history bank under `targets_only`. A resumed run equals an
    uninterrupted one only if `checkpoint_every` is a multiple of it."""
    report_every: Count = 20
    """Steps between reports of losses, collapse metrics and speed."""
    checkpoint_every: CountOrZero = 200
    """Steps between checkpoints (model, optimiser, RNG, data position)."""
    validate_every: CountOrZero = 0
    """Steps between evaluations on validation examples, for the report's curve; 0: at the end."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep, besides the best one by `best_metric`."""
    best_metric: str = "HR@50"
    """Validation metric that selects the best checkpoint."""
    num_workers: CountOrZero = 1
    """Ray Train workers; 0 trains in the driver's process."""
    min_workers: CountOrZero = 0
    """Smallest number of workers to continue with when machines are lost; 0: `num_workers`."""
    use_gpu: Literal["auto", "true", "false"] = "auto"
    """Whether each worker gets a GPU; `auto` uses those that are up or that the cluster's
    autoscaler may add, if there is one for every worker. `false` holds for the whole run, with its
    frozen outputs, embedding and evaluation."""
    threads_per_worker: CountOrZero = 0
    """CPU threads of each worker; 0 divides the machine's cores among the workers."""

    parallelism: Literal["replicate", "shard"] = "replicate"
    """Whether every worker holds the whole model (DDP) or a shard of its layers (FSDP2)."""
    micro_batch_size: CountOrZero = 0
    """User windows in a worker's memory at once (gradient cache, same result); 0: all of them."""
    micro_tokens: CountOrZero = 16_384
    """Item tokens that the gradient cache encodes at once; 0: what fits into the GPU's free
    memory (16,384 on a CPU)."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the layers and recompute the rest in the backward pass."""
    compile: bool = False
    """Compile the layers (torch.compile); it is faster on GPUs."""

    profile: bool = False
    """Write a profiler trace of three steps to RUN/profile."""

    def num_threads(self) -> int:
        """Threads of one worker on this machine."""
        return self.threads_per_worker or max(1, (os.cpu_count() or 1) // max(1, self.num_workers))


EXECUTION = frozenset(
    f"training.{name}"
    for name in (
        "num_workers", "min_workers", "use_gpu", "threads_per_worker", "parallelism",
        "micro_batch_size", "micro_tokens", "activation_checkpointing", "compile",
        "checkpoint_every", "keep_checkpoints", "best_metric", "report_every", "validate_every",
        "profile",
    )
)  # fmt: skip
"""Fields that may differ when a run is resumed: they decide on which machines and in which
portions it is computed and how often it writes, not what it learns. Losses are equal up to the
order of summation."""
WARMED_UP_BY = frozenset({"training.report_every"})
"""Execution fields that change nothing in the joint stage, but decide when the warm-up stops."""

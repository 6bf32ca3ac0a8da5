"""Configuration of pretraining, warm-up and joint training."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from karma_ray.ranges import Count, CountOrZero, Positive, Share, ShareBelowOne, Weight


@dataclass(frozen=True)
class PretrainConfig:
    """Causal language modelling on the catalogue's text: the stand-in for a pretrained LLM."""

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
    """Start the joint stage without the warm-up (control)."""
    steps: Count = 400
    """Upper bound of optimiser steps; stops earlier when the shuffled gap has plateaued."""
    batch_size: Count = 64
    """Items per step."""
    learning_rate: Weight = 1e-3
    """Peak learning rate of the decoder; new modules take `new_module_lr` times as much."""
    train: Literal["decoder", "adapters_only", "all"] = "decoder"
    """What is trained: decoder and adapters, adapters only, or the item encoder too."""


@dataclass(frozen=True)
class TrainingConfig:
    """Stage 2."""

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
    """Global gradient norm bound."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type; master weights and losses stay float32."""
    encoder_grad: Literal["full", "targets_only", "frozen"] = "full"
    """Gradient into the item encoder: everywhere, targets and negatives only, or none."""
    encoder_delay: ShareBelowOne = 0.0
    """Share of the steps in which the item encoder is frozen while the user decoder learns to
    read it (gradual unfreezing, 1801.06146)."""
    encoder_lr: Weight = 1.0
    """Factor on the learning rates of the item encoder, its new modules included."""
    bank_refresh_steps: Count = 100
    """Steps between refreshes of the history bank under `targets_only`; a resumed run equals an
    uninterrupted one when `checkpoint_every` is a multiple of it."""
    report_every: Count = 20
    """Steps between reports of losses, collapse probes and speed."""
    checkpoint_every: CountOrZero = 200
    """Steps between checkpoints (model, optimiser, RNG, data position)."""
    validate_every: CountOrZero = 0
    """Steps between evaluations on valid examples (the curve of the report); 0: at the end."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept, beside the best one by `best_metric`."""
    best_metric: str = "HR@50"
    """Validation metric whose best checkpoint is kept too."""
    num_workers: CountOrZero = 1
    """Ray Train workers; 0 trains inside the driver process."""
    min_workers: CountOrZero = 0
    """Go on with as few as these when machines are lost (elastic); 0: wait for `num_workers`."""
    threads_per_worker: CountOrZero = 0
    """CPU threads of each worker; 0 divides the machine's cores among them."""

    parallelism: Literal["replicate", "shard"] = "replicate"
    """Every worker holds the whole model (DDP), or a share of its layers (FSDP2)."""
    micro_batch_size: CountOrZero = 0
    """User windows of a worker that are in memory at once (gradient cache, same result); 0: all."""
    micro_tokens: Count = 16_384
    """Item tokens encoded at once by the gradient cache."""
    activation_checkpointing: bool = False
    """Keep only the layers' inputs and compute the rest again in the backward pass."""
    compile: bool = False
    """Compile the layers (torch.compile); pays on GPUs."""

    profile: bool = False
    """Write a profiler trace of three steps to RUN/profile."""

    def num_threads(self) -> int:
        """Threads of one worker on this machine."""
        return self.threads_per_worker or max(1, (os.cpu_count() or 1) // max(1, self.num_workers))


EXECUTION = frozenset(
    f"training.{name}"
    for name in (
        "num_workers", "min_workers", "threads_per_worker", "parallelism", "micro_batch_size",
        "micro_tokens", "activation_checkpointing", "compile", "checkpoint_every",
        "keep_checkpoints", "best_metric", "report_every", "validate_every", "profile",
    )
)  # fmt: skip
"""Fields that may differ when a run is resumed: they say on which machines, in which portions and
how often something is written, not what is learnt. Losses stay equal up to the order of sums."""
WARMED_UP_BY = frozenset({"training.report_every"})
"""Of these, what changes nothing in the joint stage but says when the warm-up has reached its
plateau."""

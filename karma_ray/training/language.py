"""Pretraining of a tiny language model on the catalogue's text, in place of a pretrained LLM.

It writes a Hugging Face folder (config, weights, tokenizer), which later stages load exactly as
they would load a real checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from karma_ray.artifacts import write_manifest
from karma_ray.data.batch import host_of, upload
from karma_ray.data.catalog import Catalog
from karma_ray.data.tokens import catalog_tokens
from karma_ray.model.backbone import build_tiny, run_body, save_body, token_embeddings
from karma_ray.model.backbones.tokenizer import save_tokenizer, train_tokenizer
from karma_ray.model.config import TinyBackboneConfig
from karma_ray.objectives.text import token_cross_entropy
from karma_ray.training.config import PretrainConfig
from karma_ray.training.loop import fit
from karma_ray.training.optim import build_optimizer
from karma_ray.training.parallel import global_sum
from karma_ray.training.step import StepOutput
from karma_ray.training.step_state import AT_THE_END, StepState
from karma_ray.training.warmup_step import TokenBatch

Record = dict[str, float]


@dataclass(frozen=True)
class PretrainStep:
    """Causal language modelling, including the end of text, on a body with a tied head."""

    def __call__(
        self, body: nn.Module, batch: TokenBatch, state: StepState = AT_THE_END
    ) -> StepOutput:
        """Return the mean cross-entropy per token."""
        embed = token_embeddings(body)
        labels = batch.tokens[:, 1:]
        lengths = host_of(batch.lengths)
        real = torch.arange(labels.shape[1]) < lengths[:, None] - 1
        mask = upload(real, labels.device)
        states = run_body(body, embed[batch.tokens[:, :-1]], real=mask)
        values = token_cross_entropy(states, embed, labels, mask)
        loss = values.sum() / global_sum(mask.sum()).clamp(min=1)
        logs: dict[str, Tensor | float] = {
            "loss/pretrain": global_sum(loss.detach()),
            "tokens": float(lengths.sum()),
        }
        return StepOutput(loss, logs)


def pretrain(
    catalog: Catalog,
    folder: str,
    *,
    tiny: TinyBackboneConfig,
    config: PretrainConfig,
    max_tokens: int,
    seed: int,
    report: Callable[[Record], object],
    progress: bool = False,
) -> None:
    """Train a tokenizer and a body on the items' texts, and write them to the local `folder`.

    The texts are tokenised into the node's file, which later stages map. The folder appears only
    when it is complete. `report` receives the loss in nats per token.
    """
    tokenizer = train_tokenizer(catalog.each_text(), tiny.vocab_size)
    body = build_tiny(tiny, len(tokenizer), seed)
    tokens, lengths = catalog_tokens(catalog, tokenizer, max_tokens)
    last: Record = {}

    def keep(record: Record) -> None:
        last.update(record)
        report(record)

    if config.steps:
        fit(
            body,
            PretrainStep(),
            build_optimizer(body, learning_rate=config.learning_rate),
            token_batches(tokens, lengths, config.batch_size, seed),
            keep,
            steps=config.steps,
            progress=progress,
        )
    draft = Path(f"{folder}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_body(body, str(draft))
    save_tokenizer(tokenizer, str(draft))
    facts: dict[str, Any] = {
        name: value for name, value in last.items() if name.startswith("loss/")
    }
    parameters = sum(parameter.numel() for parameter in body.parameters())
    write_manifest(str(draft), "language_model", num_parameters=parameters, **facts)
    draft.rename(folder)


def token_batches(
    tokens: np.ndarray, lengths: np.ndarray, batch_size: int, seed: int
) -> Iterator[TokenBatch]:
    """Yield endless shuffled epochs of `TokenBatch`es, each cut to its longest row."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(tokens))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = max(2, int(lengths[rows].max()))
            yield TokenBatch(
                torch.from_numpy(tokens[rows, :width].astype(np.int64)),
                torch.from_numpy(lengths[rows]),
            )

"""Fine-tuning of an item encoder's LLM on related items (item alignment of QARM V2, 2602.08559).

Of a pair both items are read, each with summary tokens behind it and then the other's text. The
loss is the contrastive term of the two embeddings plus the cross-entropy of the two texts, which
see the summary tokens alone.
Legend: I items, B pairs, R = 2 B rows, L tokens, D width of e with its fixed part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import ConfigDict, Field
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from karma_ray.codes.alignment import contrastive
from karma_ray.codes.summarizer import Summarizer
from karma_ray.data.batch import upload
from karma_ray.data.prompts import SpecialIds
from karma_ray.model.decodability import TextTargets, text_targets
from karma_ray.ranges import Count, CountOrZero, Positive, Share, Weight, check_ranges

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from karma_ray.codes.pairs import Pairs

MEASURED = 1024
"""Held-out pairs at most whose texts are predicted."""
LONGEST_GRADIENT = 1.0
"""Norm to which a longer gradient is scaled down."""


@dataclass(frozen=True)
class TuningConfig:
    """How the LLM of an item encoder is aligned with co-clicks."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    gap_s: Positive = 86_400.0
    """Seconds that may lie between two clicks of a pair."""
    most_pairs: Count = 50_000
    """Pairs of co-clicks whose relevance is asked for, drawn from all."""
    chance: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """A pair is kept if the pretrained LLM finds it more related than all but this share of random
    pairs of items."""
    relevance: Share = 0.3
    """Least cosine of the TF-IDF vectors of a pair's texts, where there is no pretrained LLM."""
    summary_tokens: Count = 1
    """Tokens behind an item's text whose states become its embedding."""
    steps: CountOrZero = 400
    """Steps of the optimiser; 0 leaves the LLM as it is."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Pairs of a batch; each one's other items are the negatives."""
    temperature: Positive = 0.1
    """Divides cosines in the contrastive term."""
    generation: Weight = 0.1
    """Weight of the generation term, in nats per token; 0 leaves it out."""
    learning_rate: Positive = 1e-4
    """Learning rate of AdamW, which decays linearly to 0."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the pairs that are not trained on, to measure the alignment."""
    seed: CountOrZero = 0
    """Seed of the drawn and the held-out pairs, of the batches and of further summary tokens."""

    def check(self) -> None:
        """Raise InputError on numbers out of range."""
        check_ranges(self, "align")


@dataclass(frozen=True)
class ItemTexts:
    """What is read of the items, and the part of their embeddings that is never learned."""

    tokens: NDArray[np.int32]  # [I, L]
    lengths: NDArray[np.int64]  # [I]
    fixed: NDArray[np.float32]  # [I, D - learned width]
    special: SpecialIds

    def of(self, items: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return tokens [R, L] and lengths [R] of items [R]."""
        width = int(self.lengths[items].max())
        tokens = torch.from_numpy(self.tokens[items, :width].astype(np.int64))
        return upload(tokens, device), upload(torch.from_numpy(self.lengths[items]), device)

    def targets(self, items: NDArray[np.int64], device: torch.device) -> TextTargets:
        """Return the whole texts of items [R] as targets."""
        return text_targets(*self.of(items, device), self.special, self.tokens.shape[1])


def embeddings(model: Summarizer, texts: ItemTexts, items: NDArray[np.int64], states: Tensor) -> (
    Tensor
):  # fmt: skip
    """Return e [R, D] of items [R] with summary states [R, d]."""
    fixed = upload(torch.from_numpy(texts.fixed[items]), states.device)
    return torch.cat([model.embed(states), fixed], 1)


def pair_terms(
    model: Summarizer, texts: ItemTexts, pairs: Pairs, temperature: float, *, generates: bool
) -> tuple[Tensor, Tensor]:
    """Return the contrastive term of each pair [B], and the mean loss of a generated token."""
    device = model.output.weight.device
    items, others = pairs.T.reshape(-1), pairs[:, ::-1].T.reshape(-1)  # [R] both
    targets = texts.targets(others, device) if generates else None
    summaries, states = model(*texts.of(items, device), targets)
    first, second = torch.split(embeddings(model, texts, items, summaries), len(pairs))
    rows = upload(torch.from_numpy(np.ascontiguousarray(pairs)), device)
    values = contrastive(first, second, rows, temperature)
    if targets is None:
        return values, values.new_zeros(())
    return values, model.text_losses(states, targets).sum() / targets.mask.sum()


def tune(
    model: Summarizer, texts: ItemTexts, pairs: Pairs, config: TuningConfig,
    report: Callable[[float, float], object] = lambda *_: None,
) -> None:  # fmt: skip
    """Train a model on pairs [P, 2] of rows; `report` receives both terms of every step."""
    random = np.random.default_rng(config.seed + 1)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    model.train()
    for step in tqdm(range(config.steps), desc="alignment", disable=None, leave=False):
        optimiser.param_groups[0]["lr"] = config.learning_rate * (1 - step / config.steps)
        some = pairs[random.integers(len(pairs), size=config.batch_size)]
        near, told = pair_terms(
            model, texts, some, config.temperature, generates=config.generation > 0
        )
        loss = near.mean() + config.generation * told
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(trained, LONGEST_GRADIENT)
        optimiser.step()
        report(float(near.detach().mean()), float(told.detach()))
    model.eval()


@torch.no_grad()
def generation_loss(model: Summarizer, texts: ItemTexts, pairs: Pairs, size: int = 64) -> float:
    """Return the mean cross-entropy, in nats per token, of each item's text after the other's."""
    total, count, device = 0.0, 0, model.output.weight.device
    both = np.concatenate([pairs[:MEASURED], pairs[:MEASURED, ::-1]])
    for start in range(0, len(both), size):
        items, others = both[start : start + size].T
        targets = texts.targets(others, device)
        _, states = model(*texts.of(items, device), targets)
        total += float(model.text_losses(states, targets).double().sum())
        count += int(targets.mask.sum())
    return total / count

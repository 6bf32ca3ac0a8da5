"""A projection that moves embeddings of related items together (item alignment of QARM V2).

The paper fine-tunes the LLM itself, see codes/tuning.py. Here, in seconds and for any run, the
embeddings stay frozen and a linear map over them is trained by the contrastive term.
Legend: I items, D width, P pairs, B pairs of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import ConfigDict, Field
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from karma_ray.errors import InputError
from karma_ray.ranges import CountOrZero, Positive, Share, check_ranges

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from karma_ray.codes.pairs import Pairs

FEWEST_PAIRS = 100
"""Pairs below which nothing can be learned nor measured."""
DEPTH = 50
"""Neighbours among which a held-out pair's other item is looked for."""


@dataclass(frozen=True)
class AlignmentConfig:
    """How embeddings are aligned with co-clicks."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    gap_s: Positive = 86_400.0
    """Seconds that may lie between two clicks of a pair."""
    relevance: Share = 0.3
    """Least cosine of the TF-IDF vectors of a pair's texts."""
    steps: CountOrZero = 400
    """Steps of the optimiser; 0 leaves the embeddings as they are."""
    batch_size: Annotated[int, Field(ge=2)] = 512
    """Pairs of a batch; each one's other items are the negatives."""
    temperature: Positive = 0.1
    """Divides cosines in the contrastive term."""
    learning_rate: Positive = 2e-3
    """Learning rate of AdamW, which decays linearly to 0."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the pairs that are not trained on, to measure the alignment."""
    seed: CountOrZero = 0
    """Seed of the held-out pairs and of the batches."""

    def check(self) -> None:
        """Raise InputError on numbers out of range."""
        check_ranges(self, "align")


@dataclass(frozen=True)
class Alignment:
    """A trained projection, and what it changed."""

    mean: NDArray[np.float32]  # [D]
    scale: float
    weight: NDArray[np.float32]  # [D, D]
    recall_before: float
    """Share of held-out pairs whose other item is among the DEPTH nearest of the first."""
    recall_after: float
    trained_on: int
    held_out: int

    def apply(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:  # [I, D] -> [I, D]
        """Return aligned vectors."""
        return np.asarray((vectors - self.mean) / self.scale @ self.weight.T, np.float32)


def contrastive(first: Tensor, second: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """Return InfoNCE of each pair in both directions: [B, D], [B, D], [B, 2] -> [B].

    The negatives of an item are the other items of the batch's other side, without itself.
    """
    scores = normalize(first, dim=1) @ normalize(second, dim=1).T / temperature  # [B, B]
    left, right = rows[:, 0], rows[:, 1]
    same = (right[:, None] == right[None]) | (left[:, None] == left[None])
    same |= left[:, None] == right[None]
    same &= ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    scores = scores.masked_fill(same, -torch.inf)
    own = torch.arange(len(rows), device=rows.device)
    there = cross_entropy(scores, own, reduction="none")
    return (there + cross_entropy(scores.T, own, reduction="none")) / 2


def align(vectors: NDArray[np.float32], pairs: Pairs, config: AlignmentConfig) -> Alignment:
    """Train a projection of vectors [I, D] on pairs [P, 2] of rows.

    It starts as the identity of the vectors without their mean, which all items share and which
    would dominate every cosine.

    Raises InputError on too few pairs and on numbers out of range.
    """
    config.check()
    random = np.random.default_rng(config.seed)
    tested, trained = held_out(pairs, config.held_out, random)
    mean, scale = vectors.mean(0), max(float(vectors.std(0).mean()), 1e-12)
    centred = torch.from_numpy((vectors - mean) / scale)
    weight = torch.eye(vectors.shape[1], requires_grad=True)
    optimiser = torch.optim.AdamW([weight], lr=config.learning_rate, weight_decay=0.0)
    for step in range(config.steps):
        optimiser.param_groups[0]["lr"] = config.learning_rate * (1 - step / config.steps)
        some = trained[random.integers(len(trained), size=config.batch_size)]
        first, second = (centred[some[:, side]] @ weight.T for side in (0, 1))
        loss = contrastive(first, second, torch.from_numpy(some), config.temperature).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    found = weight.detach().numpy()
    before, after = (pair_recall(v, tested) for v in (vectors, centred.numpy() @ found.T))
    return Alignment(mean, scale, found, before, after, len(trained), len(tested))


def held_out(
    pairs: Pairs, share: float, random: np.random.Generator
) -> tuple[Pairs, Pairs]:  # [P, 2]
    """Divide pairs into those that measure and those that are trained on.

    Raises InputError on too few pairs.
    """
    if len(pairs) < FEWEST_PAIRS:
        problem = f"related pairs of co-clicks are too few; {FEWEST_PAIRS} are needed"
        raise InputError("--aligned", len(pairs), problem)
    order = random.permutation(len(pairs))
    kept_out = max(1, int(share * len(pairs)))
    return pairs[order[:kept_out]], pairs[order[kept_out:]]


def pair_recall(
    vectors: NDArray[np.float32], pairs: Pairs, depth: int = DEPTH
) -> float:  # [I, D], [P, 2]
    """Return the share of pairs whose second item is among the nearest of the first by cosine."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found = 0
    for start in range(0, len(pairs), 256):
        some = pairs[start : start + 256]
        scores = unit[some[:, 0]] @ unit.T
        scores[np.arange(len(some)), some[:, 0]] = -np.inf
        own = scores[np.arange(len(some)), some[:, 1]]
        found += int(((scores > own[:, None]).sum(axis=1) < depth).sum())
    return found / len(pairs)

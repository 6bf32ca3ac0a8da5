"""L_act, equation 5, and its rivals: per-example losses of a positive against negatives.

Each variant is a frozen dataclass that *is* the function. Legend: N examples, K negatives.
`weights` [N, K] carry mask and reduction: 0 where a pair does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Pairwise:
    """Equation 5: sum_j w_j softplus(s_j - s+)."""

    def __call__(self, positive: Tensor, negatives: Tensor, weights: Tensor) -> Tensor:
        """[N], [N, K], [N, K] -> [N]."""
        return (weights * functional.softplus(negatives - positive[:, None])).sum(1)


@dataclass(frozen=True)
class InfoNCE:
    """-log softmax of the positive among the negatives (CPC, 1807.03748).

    A softmax has one denominator: a pair counts (weight > 0) or does not, and neither
    `act_reduction` nor the size of a weight changes it.
    """

    temperature: float = 1.0

    def __call__(self, positive: Tensor, negatives: Tensor, weights: Tensor) -> Tensor:
        """[N], [N, K], [N, K] -> [N]; with one negative and temperature 1 it is `Pairwise`."""
        gaps = (negatives - positive[:, None]) / self.temperature
        gaps = gaps.masked_fill(weights == 0, float("-inf"))
        zero = torch.zeros_like(positive)[:, None]
        return torch.logsumexp(torch.cat([zero, gaps], 1), 1)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """softplus(-s+) + sum_j w_j softplus(s_j): each pair a click or not."""

    def __call__(self, positive: Tensor, negatives: Tensor, weights: Tensor) -> Tensor:
        """[N], [N, K], [N, K] -> [N]."""
        return functional.softplus(-positive) + (weights * functional.softplus(negatives)).sum(1)


@dataclass(frozen=True)
class MeanSquaredError:
    """(1 - sigmoid(s+))^2 + sum_j w_j sigmoid(s_j)^2: regression of the click itself."""

    def __call__(self, positive: Tensor, negatives: Tensor, weights: Tensor) -> Tensor:
        """[N], [N, K], [N, K] -> [N]."""
        return (1 - positive.sigmoid()).square() + (weights * negatives.sigmoid().square()).sum(1)


ActionLoss = Pairwise | InfoNCE | BinaryCrossEntropy | MeanSquaredError

ACTION_LOSSES: dict[str, ActionLoss] = {
    "pairwise": Pairwise(),
    "infonce": InfoNCE(),
    "bce": BinaryCrossEntropy(),
    "mse": MeanSquaredError(),
}


def pair_weights(
    hard: Tensor, in_batch: Tensor, reduction: str, hard_weight: float, batch_weight: float
) -> Tensor:
    """Weights [N, H + P] of the pairs from the masks hard [N, H] and in_batch [N, P].

    `mean_by_type`: each type's mean, times its weight, so that N_b does not set the learning
    rate and drown the few hard negatives (METHOD 1.5); `paper_sum`: 1 each, times its weight.
    """
    parts = []
    for mask, weight in ((hard, hard_weight), (in_batch, batch_weight)):
        counted = mask.float() * weight
        if reduction == "mean_by_type":
            counted = counted / mask.sum(1, keepdim=True).clamp(min=1)
        parts.append(counted)
    return torch.cat(parts, 1)

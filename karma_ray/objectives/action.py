"""The action loss L_act (equation 5) and alternatives: losses of a positive against negatives.

Each variant is a frozen dataclass that is called like a function. Legend: N examples, K negatives.
`weights` [N, K] combine mask and reduction: 0 for a pair that does not count.
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

    A softmax has one denominator, in which a pair counts (weight > 0) or does not. Neither
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
    """softplus(-s+) + sum_j w_j softplus(s_j): every item is classified as clicked or not."""

    def __call__(self, positive: Tensor, negatives: Tensor, weights: Tensor) -> Tensor:
        """[N], [N, K], [N, K] -> [N]."""
        return functional.softplus(-positive) + (weights * functional.softplus(negatives)).sum(1)


@dataclass(frozen=True)
class MeanSquaredError:
    """(1 - sigmoid(s+))^2 + sum_j w_j sigmoid(s_j)^2: regression onto the click label."""

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
    """Return weights [N, H + P] of the pairs from the masks hard [N, H] and in_batch [N, P].

    `mean_by_type` takes each type's mean times its weight, so that the number of in-batch
    negatives neither sets the learning rate nor outweighs the few hard ones (method 1.5);
    `paper_sum` gives each pair its type's weight.
    """
    parts = []
    for mask, weight in ((hard, hard_weight), (in_batch, batch_weight)):
        counted = mask.float() * weight
        if reduction == "mean_by_type":
            counted = counted / mask.sum(1, keepdim=True).clamp(min=1)
        parts.append(counted)
    return torch.cat(parts, 1)

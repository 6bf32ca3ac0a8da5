"""The total objective, equations 4 and 9:

L = L_act + lambda_dec (L_gen + L_recon + lambda_img L_img).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from karma_ray.errors import InputError
from karma_ray.ranges import Share, Weight


@dataclass(frozen=True)
class BuiltTerms:
    """The decodability terms that exist in a run: a weight of 0 means *not built*."""

    generation: bool
    """Task 1."""
    reconstruction: bool
    """Task 2."""
    image: bool
    """The visual term."""

    @property
    def text(self) -> bool:
        """Whether any text is decoded."""
        return self.generation or self.reconstruction


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and variants of the loss terms. A weight of 0 means *not built*."""

    action_loss: Literal["pairwise", "infonce", "bce", "mse"] = "pairwise"
    """Equation 5 (`pairwise`) or an alternative."""
    act_reduction: Literal["mean_by_type", "paper_sum"] = "mean_by_type"
    """Separate means over hard and in-batch negatives, or the sum as in the paper."""
    act_positions: Literal["all", "last"] = "all"
    """Steps of a window that enter L_act."""
    hard_weight: Weight = 1.0
    """Weight of hard negatives (exposed but unclicked items)."""
    hard_ramp: Share = 0.1
    """Share of the steps without hard negatives; their weight then rises over as many steps."""
    batch_weight: Weight = 1.0
    """Weight of in-batch negatives."""
    logq: bool = False
    """Correct the in-batch negatives of `action_loss=infonce` for popularity: each is weighted by
    the inverse of its probability to be in the batch (`negatives.inclusion_log_chance`)."""
    duplicate_cosine: Share = 0.99
    """With a pretrained item encoder, items whose embeddings have a larger cosine before joint
    training are duplicates, hence no negatives of each other; 1: only those of equal text, as in a
    run of --init-from."""
    lambda_dec: Weight = 1.0
    """Weight of all decodability terms together."""
    generation: Weight = 1.0
    """Weight of L_gen, Task 1 (history to text)."""
    reconstruction: Weight = 1.0
    """Weight of L_recon, Task 2 (h_t to text)."""
    lambda_img: Weight = 0.0
    """Weight of L_img (the target's frozen visual features) relative to the texts, also in the
    warm-up; needs `collate.visual_features`."""
    gen_mode: Literal["add", "replace"] = "add"
    """In a model with a generator: keep L_act on h_t beside the generator's loss, or not."""
    gen_weight: Weight = 1.0
    """Weight of the generator's loss."""
    ce_reduction: Literal["token_mean", "sum"] = "token_mean"
    """Cross-entropy averaged over an example's tokens, or summed as in the paper."""

    @property
    def built(self) -> BuiltTerms:
        """The terms with a weight other than 0."""
        return BuiltTerms(
            generation=self.lambda_dec * self.generation != 0,
            reconstruction=self.lambda_dec * self.reconstruction != 0,
            image=self.lambda_dec * self.lambda_img != 0,
        )

    def check(self) -> None:
        """Raise InputError on settings that contradict each other."""
        if self.logq and self.action_loss != "infonce":
            message = f"corrects a softmax, and objective.action_loss={self.action_loss} has none"
            choices = ["false", "true with objective.action_loss=infonce"]
            raise InputError("objective.logq", True, message, choices=choices)


@dataclass(frozen=True)
class LossTerms:
    """Unweighted terms, each this worker's share of a global mean; None: not built."""

    action: Tensor
    generation: Tensor | None = None
    reconstruction: Tensor | None = None
    image: Tensor | None = None
    generator: Tensor | None = None

    def total(self, config: ObjectiveConfig) -> Tensor:
        """Return equation 9: L_act + lambda_dec (L_gen + L_recon + lambda_img L_img).

        A generator's loss is added, or replaces L_act (method 1.12).
        """
        total = self.action
        if self.generator is not None:
            kept = 0.0 if config.gen_mode == "replace" else total
            total = kept + config.gen_weight * self.generator
        for term, weight in (
            (self.generation, config.generation),
            (self.reconstruction, config.reconstruction),
            (self.image, config.lambda_img),
        ):
            if term is not None:
                total = total + config.lambda_dec * weight * term
        return total

    def named(self) -> dict[str, Tensor]:
        """Return the terms that were built, by their log names."""
        terms = {
            "loss/action": self.action,
            "loss/generation": self.generation,
            "loss/reconstruction": self.reconstruction,
            "loss/image": self.image,
            "loss/generator": self.generator,
        }
        return {name: term for name, term in terms.items() if term is not None}


def hard_weight_at(config: ObjectiveConfig, progress: float) -> float:
    """Return the weight of hard negatives at a share `progress` of the training: 0, then rising.

    As long as h does not reflect the query, a hard negative is noise: it only penalises differences
    between items of one query, and the loss falls fastest if they all become equal (method 1.5;
    docs/log.md, L2).
    """
    if config.hard_ramp <= 0:
        return config.hard_weight
    return config.hard_weight * min(1.0, max(0.0, progress / config.hard_ramp - 1.0))

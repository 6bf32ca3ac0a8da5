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
    """Which decodability terms exist in a run: a weight of 0 means *not built*."""

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
    """Weights and variants of the terms. A weight of 0 means *not built*."""

    action_loss: Literal["pairwise", "infonce", "bce", "mse"] = "pairwise"
    """Equation 5 or one of its rivals."""
    act_reduction: Literal["mean_by_type", "paper_sum"] = "mean_by_type"
    """Mean over hard and in-batch negatives apart, or the sum as written."""
    act_positions: Literal["all", "last"] = "all"
    """Steps that enter L_act."""
    hard_weight: Weight = 1.0
    """Weight of exposed-unclicked negatives."""
    hard_ramp: Share = 0.1
    """Share of the steps before hard negatives count; their weight then rises over as many."""
    batch_weight: Weight = 1.0
    """Weight of in-batch negatives."""
    logq: bool = False
    """Correct the in-batch negatives of `action_loss=infonce` for their popularity: an item counts
    by the inverse of its chance to be in the batch (`negatives.inclusion_log_chance`)."""
    lambda_dec: Weight = 1.0
    """Weight of the decodability terms together."""
    generation: Weight = 1.0
    """Weight of L_gen, Task 1 (history to text)."""
    reconstruction: Weight = 1.0
    """Weight of L_recon, Task 2 (h_t to text)."""
    lambda_img: Weight = 0.0
    """Weight of L_img (frozen visual features of the target) beside the texts, in the warm-up
    too; needs `collate.visual_features`."""
    gen_mode: Literal["add", "replace"] = "add"
    """Of a model with a generator: whether L_act, on h_t, stays beside the generator's loss."""
    gen_weight: Weight = 1.0
    """Weight of the generator's loss."""
    ce_reduction: Literal["token_mean", "sum"] = "token_mean"
    """Cross-entropy averaged over an example's tokens, or summed as written."""

    @property
    def built(self) -> BuiltTerms:
        """The one place that says what a weight of 0 leaves out."""
        return BuiltTerms(
            generation=self.lambda_dec * self.generation != 0,
            reconstruction=self.lambda_dec * self.reconstruction != 0,
            image=self.lambda_dec * self.lambda_img != 0,
        )

    def check(self) -> None:
        """Raise InputError on settings that do not go together."""
        if self.logq and self.action_loss != "infonce":
            message = f"corrects a softmax, and objective.action_loss={self.action_loss} has none"
            choices = ["false", "true with objective.action_loss=infonce"]
            raise InputError("objective.logq", True, message, choices=choices)


@dataclass(frozen=True)
class LossTerms:
    """Raw, unweighted terms, each a global mean (this worker's share of it); None: not built."""

    action: Tensor
    generation: Tensor | None = None
    reconstruction: Tensor | None = None
    image: Tensor | None = None
    generator: Tensor | None = None

    def total(self, config: ObjectiveConfig) -> Tensor:
        """Equation 9: L_act + lambda_dec (L_gen + L_recon + lambda_img L_img).

        With a generator its loss is added, or stands in L_act's place (METHOD 1.12).
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
        """The terms that were built, under their log names."""
        terms = {
            "loss/action": self.action,
            "loss/generation": self.generation,
            "loss/reconstruction": self.reconstruction,
            "loss/image": self.image,
            "loss/generator": self.generator,
        }
        return {name: term for name, term in terms.items() if term is not None}


def hard_weight_at(config: ObjectiveConfig, progress: float) -> float:
    """Weight of hard negatives at a share `progress` of the training: 0, then rising, then full.

    Before h knows what the query asks for, a hard negative is noise that only punishes any
    difference between items of one query: the fastest way down is to make them all the same
    (METHOD 1.5; docs/log.md, L2).
    """
    if config.hard_ramp <= 0:
        return config.hard_weight
    return config.hard_weight * min(1.0, max(0.0, progress / config.hard_ramp - 1.0))

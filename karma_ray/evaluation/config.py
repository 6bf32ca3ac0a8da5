"""Configuration of the metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from karma_ray.errors import InputError
from karma_ray.ranges import Count, CountOrZero

SMALLEST_CORPUS = 100
"""Items of `evaluation.corpus=sampled:N`: below it a list of 50 says nothing."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What METHOD leaves open about the metrics, with its defaults."""

    gauc_weight: Literal["impressions", "positives", "uniform"] = "impressions"
    """Weight of a group in gAUC."""
    hr_unit: Literal["click", "any_hit"] = "click"
    """Per-click mean, or one hit per request."""
    js_mode: Literal["per_item", "pooled"] = "per_item"
    """Mean of Jaccard per retrieved item, or Jaccard with the union of the list."""
    corpus: str = "full"
    """What a target is ranked among: the whole catalogue, or `sampled:N`, N items drawn once (the
    same for every example and ranker) and the target. A sample flatters, and not every ranker
    alike (Krichene & Rendle 2020): for comparison with figures that were published so."""
    block_size: Count = 256
    """Examples scored at once; bounds memory to block_size x catalogue."""
    max_examples: CountOrZero = 0
    """Evaluate at most so many examples (a seeded sample); 0: all."""

    def corpus_size(self) -> int:
        """N of `sampled:N`; 0 for the whole catalogue. Raises InputError on anything else."""
        if self.corpus == "full":
            return 0
        kind, _, number = self.corpus.partition(":")
        if kind == "sampled" and number.isdecimal() and int(number) >= SMALLEST_CORPUS:
            return int(number)
        message = f"choose full, or sampled:N with N of at least {SMALLEST_CORPUS}"
        raise InputError("evaluation.corpus", self.corpus, message)

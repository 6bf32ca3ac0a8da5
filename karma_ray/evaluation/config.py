"""Configuration of the evaluation metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from karma_ray.errors import InputError
from karma_ray.ranges import Count, CountOrZero

SMALLEST_CORPUS = 100
"""Smallest N of `evaluation.corpus=sampled:N`; with fewer items a list of 50 is meaningless."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Choices that the paper leaves open, with their defaults."""

    gauc_weight: Literal["impressions", "positives", "uniform"] = "impressions"
    """Weight of a group (request) in gAUC."""
    hr_unit: Literal["click", "any_hit"] = "click"
    """Unit of HR: each click, or a request with any hit."""
    js_mode: Literal["per_item", "pooled"] = "per_item"
    """JS@50: mean Jaccard per retrieved item, or Jaccard with the union of the list."""
    corpus: str = "full"
    """Items that a target is ranked among: the whole catalogue, or `sampled:N`, which means the
    target and N items that are drawn once for all examples and rankers. Sampled metrics are too
    high, and not equally so for all rankers (Krichene & Rendle 2020); use them only to compare
    with published sampled figures."""
    block_size: Count = 256
    """Examples scored at once, fewer if they had more than 2^27 scores (more than half a million
    items, by default)."""
    max_examples: CountOrZero = 0
    """Largest number of examples to evaluate (a seeded sample); 0: all."""
    paraphrases: str = ""
    """Table of other words for queries: `hm`, or a .tsv, .csv or .parquet file with the columns
    `phrase` and `paraphrase`. A test query that the phrases cover whole (longest first) is
    rewritten and ranked again, which is measured under `paraphrased/`. Empty: not measured."""
    general_texts: str = ""
    """Texts that are not items, on which forgetting is measured: a .txt with a text per line, or
    Parquet with a column `text` or the columns of items. Default: DATA/other_items, if it is
    there."""

    def corpus_size(self) -> int:
        """Return N of `sampled:N`, or 0 for the whole catalogue; raises InputError otherwise."""
        if self.corpus == "full":
            return 0
        kind, _, number = self.corpus.partition(":")
        if kind == "sampled" and number.isdecimal() and int(number) >= SMALLEST_CORPUS:
            return int(number)
        message = f"choose full, or sampled:N with N of at least {SMALLEST_CORPUS}"
        raise InputError("evaluation.corpus", self.corpus, message)

"""The configuration of a CTR model: its family, its sizes, and the run whose vectors it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from karma_ray.ranges import Count, CountOrZero, ShareBelowOne, Weight

NO_CODES = "none"
"""The value of `codes` with which no semantic ids are read."""


@dataclass(frozen=True)
class RankingConfig:
    """Click-through rates of the items of a page."""

    family: str = ""
    """Family of the CTR model (ranking/families.py); empty if the run trains no CTR model."""
    vectors: str = ""
    """Finished run whose item vectors the CTR model reads; `--vectors` sets it. A family that reads
    the vectors themselves also takes RUN/aligned_embeddings."""
    interest: bool = False
    """Whether h_t . e of that run is one more feature."""
    width: Count = 16
    """Width of the embeddings of items, attributes and query terms."""
    hidden: Count = 64
    """Units of the first layer after the fusion; the second has half as many."""
    attention_hidden: Count = 16
    """Units of the layer that weighs each item of the history against the candidate."""
    dropout: ShareBelowOne = 0.0
    """Share of the first layer's units that is dropped in training."""
    max_history: Count = 20
    """Largest number of clicks before a page that the model reads."""
    max_query_terms: Count = 8
    """Largest number of a query's words that the model reads."""
    query_buckets: Count = 8192
    """Rows of the table of hashed query words."""
    recent_items: Count = 20
    """Newest clicks that `ctr_qarm` reads for every candidate; it searches all of `max_history`."""
    gsu_items: CountOrZero = 20
    """Clicks whose vectors are nearest to a candidate, which `ctr_qarm` reads for it; 0: none."""
    codes: str = ""
    """Folder of the semantic ids that `ctr_qarm` reads (default: `item_codes` of the run of
    `vectors`), or `none`; `--codes` sets it."""
    epochs: CountOrZero = 3
    """Passes over the training pages, which give the steps; 0: `training.steps`."""
    distillation: Weight = 0.0
    """Weight of 1 - cos(user's vector, that of a teacher which reads the later clicks); with 0 no
    teacher is trained."""
    anchors: Literal["decoded", "words"] = "decoded"
    """Text anchors of `ctr_sarm`: what the run of `--vectors` decodes from an item's vector, or
    the item's own words."""
    anchor_tokens: Count = 24
    """Largest number of tokens of an item's anchors."""


CTR = {
    "ctr_din": RankingConfig(family="din"),
    "ctr_simtier": RankingConfig(family="simtier"),
    "ctr_sarm": RankingConfig(family="sarm"),
    "ctr_ocarm": RankingConfig(family="ocarm", distillation=1.0),
    "ctr_qarm": RankingConfig(family="qarm", max_history=200),
}
"""The CTR model of each recipe."""

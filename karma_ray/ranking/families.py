"""The families of CTR models: how each is built, what it reads, and what its objective adds.

A new family is one module beside this one and one entry of FAMILIES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from karma_ray.data.catalog import Catalog
from karma_ray.errors import InputError
from karma_ray.ranking.config import RankingConfig
from karma_ray.ranking.din import Din
from karma_ray.ranking.features import TierWeights, num_features
from karma_ray.ranking.items import ItemEmbedding, ItemFacts
from karma_ray.ranking.objective import CLICKS, Term
from karma_ray.ranking.qarm import CodedItems, Qarm, with_codes


@dataclass(frozen=True)
class Sizes:
    """What a model must know of the data before it is built; saved beside its weights."""

    num_items: int
    attributes: list[int]
    """Codes of every attribute."""
    vector_width: int = 0
    """Width of the items' vectors, if the model holds them."""
    codes: list[int] = field(default_factory=list)
    """Semantic ids of every level, if the model reads them."""

    @classmethod
    def of(cls, facts: ItemFacts) -> Sizes:
        width = 0 if facts.vectors is None else facts.vectors.shape[1]
        codes = [] if facts.codes is None else facts.codes.sizes
        return cls(facts.num_items, facts.sizes, width, codes)


Reads = Callable[[ItemFacts, RankingConfig, str, str], ItemFacts]
"""(facts, configuration, data, cache) -> the facts with more in them."""


@dataclass(frozen=True)
class Family:
    """One kind of CTR model.

    A model has `inputs`, the names of the batch's tensors that `forward` takes, and returns a
    logit per candidate. Its `know(facts)`, if it has one, and that of `items` take what the
    catalogue says of the items; all of it is in buffers, so that the weights alone serve.
    """

    build: Callable[[RankingConfig, Sizes], nn.Module]
    """Builds the model with initial weights."""
    uses_vectors: bool = False
    """Whether it reads the features of `ranking.vectors`."""
    reads: Reads | None = None
    """Adds what it reads of the run of `ranking.vectors` instead of features, if it does."""
    uses_codes: bool = False
    """Whether it reads the semantic ids of `ranking.codes`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Further list columns of row numbers in the exposures, by the name in `CtrBatch.extra` of the
    tensor [R, n] that they become, padded with -1 in front."""
    terms: Callable[[RankingConfig], list[Term]] = lambda config: [CLICKS]
    """The terms of its objective."""


def _din(config: RankingConfig, sizes: Sizes) -> nn.Module:
    items = ItemEmbedding(sizes.num_items, sizes.attributes, config.width)
    return Din(config, items, nn.Identity(), 0)


def _simtier(config: RankingConfig, sizes: Sizes) -> nn.Module:
    items = ItemEmbedding(sizes.num_items, sizes.attributes, config.width)
    count = num_features(config.interest)
    return Din(config, items, TierWeights(config.interest), count)


def _qarm(config: RankingConfig, sizes: Sizes) -> nn.Module:
    base = ItemEmbedding(sizes.num_items, sizes.attributes, config.width)
    items = CodedItems(base, sizes.num_items, sizes.codes)
    return Qarm(config, items, sizes.vector_width)


FAMILIES: dict[str, Family] = {
    "din": Family(_din),
    "simtier": Family(_simtier, uses_vectors=True),
    "qarm": Family(_qarm, reads=with_codes, uses_codes=True),
}


def family_of(config: RankingConfig) -> Family:
    """Return the family of a configuration; raises InputError on an unknown one."""
    if config.family not in FAMILIES:
        raise InputError("ranking.family", config.family, choices=FAMILIES)
    return FAMILIES[config.family]


def build_model(config: RankingConfig, sizes: Sizes, seed: int = 0) -> nn.Module:
    """Build the model of a configuration with initial weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family_of(config).build(config, sizes)


def facts_of(config: RankingConfig, data: str, cache: str) -> ItemFacts:
    """Return what a model knows of the items at `data` before it is trained."""
    facts, reads = ItemFacts.of(Catalog.load(data)), family_of(config).reads
    return facts if reads is None else reads(facts, config, data, cache)

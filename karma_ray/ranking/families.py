"""The families of CTR models: how each is built, what it reads, and what its objective adds.

A new family is one module beside this one and one entry of FAMILIES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from karma_ray.data.catalog import Catalog
from karma_ray.errors import InputError
from karma_ray.ranking.anchors import ensure_anchors, load_anchors
from karma_ray.ranking.config import RankingConfig
from karma_ray.ranking.din import Din
from karma_ray.ranking.features import TierWeights, num_features
from karma_ray.ranking.items import ItemEmbedding, ItemFacts
from karma_ray.ranking.objective import CLICKS, Term
from karma_ray.ranking.ocarm import LATER, Ocarm, OcarmTeacher, ocarm_terms
from karma_ray.ranking.qarm import CodedItems, Qarm, with_codes
from karma_ray.ranking.sarm import (
    TEXT_RATES,
    AnchoredItems,
    ItemBank,
    VectorItems,
    gate_values,
    with_bank,
)
from karma_ray.ranking.vectors import frozen_vectors
from karma_ray.retrieval.similarity import unit


@dataclass(frozen=True)
class Sizes:
    """What a model must know of the data before it is built; saved beside its weights."""

    num_items: int
    attributes: list[int]
    """Codes of every attribute."""
    vector_width: int = 0
    """Width of the items' vectors, if the model holds them."""
    anchors: tuple[int, int, int] = (0, 0, 0)
    """Different anchors, different tokens of them, and tokens of one, if the model reads them."""
    codes: list[int] = field(default_factory=list)
    """Semantic ids of every level, if the model reads them."""

    @classmethod
    def of(cls, facts: ItemFacts) -> Sizes:
        width = 0 if facts.vectors is None else facts.vectors.shape[1]
        anchors = (0, 0, 0) if facts.anchors is None else facts.anchors.sizes
        codes = [] if facts.codes is None else facts.codes.sizes
        return cls(facts.num_items, facts.sizes, width, anchors, codes)


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
    vectors_optional: bool = False
    """Whether it can do without that run."""
    may_be_aligned: bool = False
    """Whether `ranking.vectors` may also be a run's aligned embeddings."""
    uses_codes: bool = False
    """Whether it reads the semantic ids of `ranking.codes`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Further list columns of row numbers in the exposures, by the name in `CtrBatch.extra` of the
    tensor [R, n] that they become, padded with -1 in front."""
    teacher: str = ""
    """Family of the model that is trained first where `ranking.distillation` is not 0."""
    terms: Callable[[RankingConfig, nn.Module | None], list[Term]] = lambda config, teacher: [
        CLICKS
    ]
    """The terms of its objective; the second argument is the trained teacher."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Factors on the learning rate, by the beginning of the names of parameters."""
    to_serve: Callable[[nn.Module], nn.Module] = lambda model: model
    """Returns what of a trained model is saved."""
    build_to_serve: Callable[[RankingConfig, Sizes], nn.Module] | None = None
    """Builds what `to_serve` returns, if that is another model."""
    serves: bool = True
    """Whether it answers requests; one that reads what comes after the page cannot."""
    notes: Callable[[nn.Module], dict[str, float]] = lambda model: {}
    """What a trained model says of itself, for metrics.json."""


def _items(config: RankingConfig, sizes: Sizes) -> ItemEmbedding:
    return ItemEmbedding(sizes.num_items, sizes.attributes, config.width)


def _din(config: RankingConfig, sizes: Sizes) -> nn.Module:
    return Din(config, _items(config, sizes), nn.Identity(), 0)


def _simtier(config: RankingConfig, sizes: Sizes) -> nn.Module:
    count = num_features(config.interest)
    return Din(config, _items(config, sizes), TierWeights(config.interest), count)


def _vector_items(config: RankingConfig, sizes: Sizes) -> nn.Module:
    items = _items(config, sizes)
    return VectorItems(items, sizes.num_items, sizes.vector_width) if sizes.vector_width else items


def _vectors(config: RankingConfig, sizes: Sizes) -> nn.Module:
    return Din(config, _vector_items(config, sizes), nn.Identity(), 0)


def _with_vectors(facts: ItemFacts, config: RankingConfig, data: str, cache: str) -> ItemFacts:
    if not config.vectors:
        return facts
    return replace(facts, vectors=unit(frozen_vectors(config.vectors, data).embeddings))


def _sarm(config: RankingConfig, sizes: Sizes) -> nn.Module:
    items = AnchoredItems(_items(config, sizes), sizes.num_items, *sizes.anchors)
    return Din(config, items, nn.Identity(), 0)


def _sarm_to_serve(config: RankingConfig, sizes: Sizes) -> nn.Module:
    bank = ItemBank(torch.zeros(sizes.num_items + 1, config.width))
    return Din(config, bank, nn.Identity(), 0)


def _with_anchors(facts: ItemFacts, config: RankingConfig, data: str, cache: str) -> ItemFacts:
    folder = ensure_anchors(config.vectors, data, config.anchors, config.anchor_tokens, cache)
    return replace(facts, anchors=load_anchors(folder, config.vectors, data))


def _qarm(config: RankingConfig, sizes: Sizes) -> nn.Module:
    items = CodedItems(_items(config, sizes), sizes.num_items, sizes.codes)
    return Qarm(config, items, sizes.vector_width)


FAMILIES: dict[str, Family] = {
    "din": Family(_din),
    "simtier": Family(_simtier, uses_vectors=True),
    "vectors": Family(_vectors, reads=_with_vectors, may_be_aligned=True),
    "sarm": Family(
        _sarm, reads=_with_anchors, rates=TEXT_RATES,
        to_serve=with_bank, build_to_serve=_sarm_to_serve,
        notes=lambda model: gate_values(model.items),  # type: ignore[arg-type]
    ),
    "ocarm": Family(
        lambda config, sizes: Ocarm(config, _vector_items(config, sizes)),
        reads=_with_vectors, vectors_optional=True, may_be_aligned=True, columns=LATER,
        teacher="ocarm_teacher", terms=ocarm_terms,
    ),
    "ocarm_teacher": Family(
        lambda config, sizes: OcarmTeacher(config, _vector_items(config, sizes)),
        reads=_with_vectors, vectors_optional=True, may_be_aligned=True, columns=LATER,
        serves=False,
    ),
    "qarm": Family(_qarm, reads=with_codes, uses_codes=True),
}  # fmt: skip


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


def build_to_serve(config: RankingConfig, sizes: Sizes) -> nn.Module:
    """Build the model that a run saves, to be filled with its weights."""
    family = family_of(config)
    return (family.build_to_serve or family.build)(config, sizes)


def facts_of(config: RankingConfig, data: str, cache: str) -> ItemFacts:
    """Return what a model knows of the items at `data` before it is trained."""
    facts, reads = ItemFacts.of(Catalog.load(data)), family_of(config).reads
    return facts if reads is None else reads(facts, config, data, cache)

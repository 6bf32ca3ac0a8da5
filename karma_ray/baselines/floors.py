"""Construction of floors and ceilings by the name of their recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from karma_ray.artifacts import exists, join
from karma_ray.baselines.affinity import AffinityRanker
from karma_ray.baselines.bm25 import Bm25Ranker
from karma_ray.baselines.llm import LlmAffinityRanker, LlmRanker, TextVectors
from karma_ray.baselines.popularity import CLICK_COLUMNS, PopularityRanker, training_clicks
from karma_ray.baselines.query_filter import PopularQueryFilterRanker, QueryFilterRanker
from karma_ray.baselines.ranker import Ranker
from karma_ray.baselines.tfidf import TfidfRanker
from karma_ray.errors import InputError

if TYPE_CHECKING:
    from karma_ray.data.catalog import Catalog
    from karma_ray.data.prepared import PreparedData

NAMES = (
    "popularity",
    "tfidf",
    "bm25",
    "llm",
    "query_filter",
    "query_filter_popular",
    "affinity",
    "llm_affinity",
    "oracle",
    "taste_oracle",
)


def build_floor(
    name: str, data: PreparedData, seed: int = 0, vectors: TextVectors | None = None
) -> Ranker:
    """Build the ranker of a floor or ceiling recipe; only `query_filter` draws from `seed`.

    `vectors` are those of a pretrained LLM, for the floors `llm` and `llm_affinity`. Raises
    InputError on an unknown name, for these two without vectors, and for a ceiling on data without
    known truth.
    """
    if name in ("oracle", "taste_oracle"):
        return _ceiling(name, data)
    catalog = data.catalog()
    if name == "tfidf":
        return TfidfRanker(catalog)
    if name == "bm25":
        return Bm25Ranker(catalog)
    if name in ("llm", "llm_affinity"):
        return _of_llm(name, data, catalog, vectors)
    if name == "query_filter":
        return QueryFilterRanker(catalog, data.query_matches(catalog), seed)
    if name not in NAMES:
        raise InputError("--recipe", name, choices=NAMES)
    clicks = training_clicks(data.windows(*CLICK_COLUMNS), catalog)
    if name == "popularity":
        return PopularityRanker(clicks)
    if name == "query_filter_popular":
        return PopularQueryFilterRanker(clicks, data.query_matches(catalog))
    return AffinityRanker(catalog, data.query_matches(catalog), clicks)


def _of_llm(name: str, data: PreparedData, catalog: Catalog, vectors: TextVectors | None) -> Ranker:
    if vectors is None:
        message = "needs a pretrained language model: name one with --set model.checkpoint=..."
        raise InputError("--recipe", name, message)
    if name == "llm":
        return LlmRanker(catalog, vectors)
    return LlmAffinityRanker(catalog, data.query_matches(catalog), vectors)


def _ceiling(name: str, data: PreparedData) -> Ranker:
    if not exists(join(data.items_uri, "truth")):
        raise InputError(
            "--recipe", name, f"needs the toy shop's truth table, absent in {data.items_uri}"
        )
    from karma_ray.baselines.oracle import PosteriorOracle, TasteOracle

    kind = PosteriorOracle if name == "oracle" else TasteOracle
    ranker: Ranker = kind.load(data.items_uri, data.catalog())
    return ranker

"""What every list of recall finds, what it adds to the blend, and the blend against the floors.

It measures a sample of the test clicks. Differences have intervals over users.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from karma_ray import recipes
from karma_ray.artifacts import RunFolder, exists, write_json
from karma_ray.errors import InputError
from karma_ray.evaluation.impressions import sampled_rows
from karma_ray.metrics.ranking import hit, hit_rate
from karma_ray.metrics.significance import paired_bootstrap
from karma_ray.retrieval.blend import LISTS, Blend
from karma_ray.retrieval.blend_fit import Gathered
from karma_ray.retrieval.blended import load_blended
from karma_ray.retrieval.parts import channels_of, served
from karma_ray.runs.text_vectors import LlmTexts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from karma_ray.baselines.ranker import Ranker
    from karma_ray.config import Config
    from karma_ray.data.catalog import Catalog
    from karma_ray.data.prepared import PreparedData
    from karma_ray.evaluation.evaluate import EvaluationResult
    from karma_ray.retrieval.retriever import Retriever
    from karma_ray.runs.floor_metrics import FloorFile

    Ranks = NDArray[np.int64]

LOG = logging.getLogger(__name__)
FILE = "channels.json"
DEPTHS = (10, 50, 200)
MAX_CLICKS = 4000
"""Test clicks that are measured."""
SAME = {"bm25": "bm25", "affinity": "affinity", "query_filter_popular": "popularity"}
"""Floors that are a channel's list."""


class Evaluating(Protocol):
    """What evaluates every ranker of a run on the same examples: an `Evaluator`."""

    config: Config
    source: PreparedData
    catalog: Catalog
    warm: NDArray[np.bool_]  # [I]

    def detailed(self, ranker: Ranker, examples: pa.Table) -> EvaluationResult:
        """Return the metrics and the values per example."""


def channel_metrics(
    evaluator: Evaluating, retriever: Retriever, run: str, out: RunFolder, cache: str,
    known: FloorFile | None = None,
) -> dict[str, float]:  # fmt: skip
    """Measure the lists of a run and their blend, and write channels.json into `out`.

    Floors that `known` has the ranks of are not measured again.

    Returns `blend/HR@K`, `channel/NAME/HR@K` and `channel/NAME/increment@K`, the HR@K that the
    blend has more than one that was fitted without the list. Nothing for a run without channels.
    """
    folder, config = served(run), evaluator.config
    most = min(MAX_CLICKS, config.evaluation.max_examples or MAX_CLICKS)
    examples = evaluator.source.examples("test")
    picked = sampled_rows(examples.num_rows, most, config.seed)
    examples = examples.take(pa.array(picked))
    if not exists(f"{channels_of(folder)}/manifest.json") or examples.num_rows == 0:
        return {}
    LOG.info("lists of recall and their blend on %d test clicks", examples.num_rows)
    search = load_blended(folder, retriever)
    found = Gathered.of(retriever, search.channels, examples)
    blend = search.blend
    ranks = {"blend": found.ranks(blend), **{name: found.ranks_in(name) for name in LISTS}}
    without = {
        name: found.ranks(Blend(blend.kind, weights), without=name)
        for name, weights in blend.without.items()
    }
    floors = dict(_floors(evaluator, examples, picked, cache, known))
    rows = [_row("blend", "blend", ranks["blend"])]
    for name in LISTS:
        row = _row(name, "channel", ranks[name]) | _gains(ranks["blend"], ranks[name], found)
        if name in without:
            row |= {f"increment@{k}": hit_rate(ranks["blend"], k) - hit_rate(without[name], k)
                    for k in DEPTHS}  # fmt: skip
        rows.append(row)
    for name, of_floor in floors.items():
        rows.append(_row(name, "floor", of_floor) | _gains(ranks["blend"], of_floor, found))
    facts = {"num_test": examples.num_rows, "kind": blend.kind, "is_served": blend.is_served,
             "measured": dict(blend.measured), "weights": dict(blend.weights)}  # fmt: skip
    write_json({**facts, "rows": rows}, out.path(FILE))
    return _metrics(rows) | _by_target(evaluator, examples, ranks["blend"])


def _floors(
    evaluator: Evaluating, examples: pa.Table, picked: Ranks, cache: str, known: FloorFile | None
) -> Iterator[tuple[str, Ranks]]:
    """Yield the ranks of the floors whose list is not a channel's, on the same examples."""
    from karma_ray.baselines.floors import build_floor  # scikit-learn takes its time

    config, source = evaluator.config, evaluator.source
    vectors = None
    try:
        texts = LlmTexts.of(config, source.items_uri, cache)
        vectors = texts.vectors() if texts else None
    except InputError as error:
        LOG.warning("the floors of an LLM are left out: %s", error)
    for name in recipes.FLOORS:
        if name in SAME or (name in recipes.LLM_FLOORS and vectors is None):
            continue
        ranks = known.ranks(name) if known is not None else None
        if ranks is not None:
            yield name, ranks[picked]
            continue
        ranker = build_floor(name, source, config.seed, vectors)
        yield name, evaluator.detailed(ranker, examples).details.ranks


def _row(name: str, role: str, ranks: Ranks) -> dict[str, Any]:
    return {"name": name, "role": role, **{f"HR@{k}": hit_rate(ranks, k) for k in DEPTHS}}


def _gains(blend: Ranks, other: Ranks, found: Gathered) -> dict[str, Any]:
    """Return how much more the blend hits, with the 95 % interval over users."""
    gains = {}
    for k in DEPTHS:
        ours, theirs = (100.0 * hit(side, k) for side in (blend, other))
        gain = paired_bootstrap(ours, theirs, found.users, seed=0)
        gains[f"gain@{k}"] = [gain.difference, gain.low, gain.high]
    return gains


def _metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in rows:
        if row["role"] != "floor":
            prefix = "blend" if row["role"] == "blend" else f"channel/{row['name']}"
            numbers = {key: value for key, value in row.items() if isinstance(value, float)}
            found |= {f"{prefix}/{key}": value for key, value in numbers.items()}
    return found


def _by_target(evaluator: Evaluating, examples: pa.Table, ranks: Ranks) -> dict[str, float]:
    """Return the blend's rates on targets with and without a training click."""
    rows = evaluator.catalog.rows(examples.column("positive_item_id").combine_chunks())
    warm = (rows >= 0) & evaluator.warm[np.maximum(rows, 0)]
    found: dict[str, float] = {"blend/num_test": len(ranks)}
    for name, some in (("warm", warm), ("cold", ~warm)):
        if some.any():
            found |= {f"blend/{name}/HR@{k}": hit_rate(ranks[some], k) for k in DEPTHS}
    return found

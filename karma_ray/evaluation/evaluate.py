"""The evaluation of every ranker: exact, over the whole catalogue, in blocks (method 1.13).

History items stay in the catalogue (repurchase), ties count against the target, and rates are in
percent. `measurement` iterates over the examples.
Legend: n examples, I items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from karma_ray.baselines.ranker import Ranker as Ranker
from karma_ray.data.catalog import Catalog
from karma_ray.evaluation.config import EvaluationConfig
from karma_ray.evaluation.measurement import ALONE, EvaluationDetails, Measurement, Workers

if TYPE_CHECKING:
    from karma_ray.data.prepared import QueryMatches


@dataclass(frozen=True)
class EvaluationResult:
    """The metrics, and the values per example that they average."""

    metrics: dict[str, float]
    details: EvaluationDetails


def evaluate(
    ranker: Ranker,
    examples: pa.Table,
    catalog: Catalog,
    *,
    config: EvaluationConfig,
    train_item_ids: NDArray[np.bool_] | set[str],
    query_matches: QueryMatches,
    held_out: NDArray[np.bool_] | None = None,
    seed: int = 0,
    workers: Workers = ALONE,
) -> EvaluationResult:
    """Return all metrics of a ranker on `examples`, and the values per example behind them.

    Keys: HR@10, HR@50, HR@200, HR@1000, NDCG@10, MRR, JS@50, JS@50_excl_gt, gAUC (absent
    without a judged request), num_test, num_gauc_groups, num_unknown_target, and the same under
    `warm/` and `cold/` (target with or without a training click), `first/` and `repeat/` (target
    in the history), and `in_query/` (rank among the items that match the query). Examples are
    outside `in_query/`, and counted in `in_query/num_outside`, if they have no query, or one that
    matches all items or not the target. An empty section has only its counts. A target that is
    not in the catalogue is a miss, and cold.

    `train_item_ids` is the mask [I] of training-clicked items, or their ids. With a mask [I]
    `held_out` there is also the section `held_out/` of the targets in it. With
    `config.max_examples` a sample drawn from `seed` is evaluated. With `workers` all of them call
    this, rank a share, and get the whole result. Raises KarmaRayError when a score is NaN.
    """
    measurement, sample = measure(ranker, examples, catalog, config, query_matches, seed, workers)
    metrics = measurement.metrics(_as_mask(train_item_ids, catalog), held_out)
    return EvaluationResult(metrics, measurement.details(sample))


def measure(
    ranker: Ranker,
    examples: pa.Table,
    catalog: Catalog,
    config: EvaluationConfig,
    query_matches: QueryMatches,
    seed: int = 0,
    workers: Workers = ALONE,
) -> tuple[Measurement, NDArray[np.int64]]:
    """Rank the sample of `evaluate`, or the share of one of `workers`; returns its rows too."""
    sample = _sampled_rows(examples.num_rows, config.max_examples, seed)
    taken = examples.take(pa.array(sample)) if len(sample) < examples.num_rows else examples
    measurement = Measurement(taken, catalog, config, query_matches)
    measurement.run(ranker, workers)
    return measurement, sample


def _sampled_rows(num: int, limit: int, seed: int) -> NDArray[np.int64]:
    if limit <= 0 or num <= limit:
        return np.arange(num)
    chosen = np.random.default_rng(seed).choice(num, limit, replace=False)
    return np.sort(chosen)


def _as_mask(train_item_ids: NDArray[np.bool_] | set[str], catalog: Catalog) -> NDArray[np.bool_]:
    if isinstance(train_item_ids, np.ndarray):
        return train_item_ids
    mask = np.zeros(catalog.num_items, dtype=bool)
    rows = catalog.rows(list(train_item_ids))
    mask[rows[rows >= 0]] = True
    return mask

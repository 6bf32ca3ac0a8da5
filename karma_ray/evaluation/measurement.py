"""Measurement of a ranker: one pass over the examples in blocks, values per example, and means.

Memory is proportional to block x catalogue, never to users x items, and a block is the smaller the
larger the catalogue (MAX_SCORES). The scores of a block are
dropped after ranks, term overlap and the scores of its pages have been computed. Workers that
measure together take whole blocks, so each computes what a single one would, to the last bit.
Legend: n examples, b of them in a block, I items, G judged requests.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from karma_ray.baselines.ranker import DeviceRanker, Ranker
from karma_ray.data.catalog import Catalog
from karma_ray.errors import KarmaRayError
from karma_ray.evaluation.config import EvaluationConfig
from karma_ray.evaluation.impressions import impressions, is_repeat, request_numbers
from karma_ray.metrics import ranking
from karma_ray.metrics.blocks import ArrayScores, ScoreBlock, TensorScores
from karma_ray.metrics.semantic import TermMatrix, without_truth

if TYPE_CHECKING:
    from karma_ray.data.prepared import QueryMatches

logger = logging.getLogger(__name__)

CUTOFFS = (10, 50, 200, 1000)
JS_DEPTH = 50
MAX_SCORES = 2**27
"""Scores in memory at once (half a gigabyte in float32), and a few arrays of their size beside."""
_PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class EvaluationDetails:
    """Values per example, for paired tests; the order is the same for all rankers."""

    rows: NDArray[np.int64]
    """[n] row of each example in the given table (a sample keeps its order)."""
    user_ids: list[str | None]
    """[n]"""
    ranks: NDArray[np.int64]
    """[n] pessimistic rank of the target; `ranking.MISS` if it is not in the catalogue."""
    query_ranks: NDArray[np.int64]
    """[n] rank among the items that match the query; 0 for examples outside `in_query/`."""
    js: NDArray[np.float64]
    """[n] JS@50 in [0, 1]."""
    js_excl_gt: NDArray[np.float64]
    """[n] JS@50 without the target."""
    group_user_ids: list[str | None]
    """[G]"""
    group_auc: NDArray[np.float64]
    """[G] AUC of each judged request."""
    group_weights: NDArray[np.float64]
    """[G] weight of each judged request in gAUC."""


@dataclass(frozen=True)
class Workers:
    """Workers that measure together, each some of the blocks; by default there is one."""

    rank: int = 0
    """Number of this worker."""
    count: int = 1
    add: Callable[[NDArray[Any]], NDArray[Any]] = lambda values: values
    """Returns the sum of all workers' arrays; all of them call it."""

    def share(self, num_blocks: int) -> list[tuple[int, bool]]:
        """Return the blocks that this worker scores, and whether each counts.

        All score equally many, since a pass through sharded layers needs every worker: the last
        block stands in for a missing one.
        """
        dealt = range(self.rank, -(-num_blocks // self.count) * self.count, self.count)
        return [(min(block, num_blocks - 1), block < num_blocks) for block in dealt]


ALONE = Workers()


def _rows_at_once(block_size: int, num_items: int) -> int:
    """Return how many examples are scored at once: fewer where the catalogue is very large."""
    return max(1, min(block_size, MAX_SCORES // num_items))


def _title_terms(catalog: Catalog) -> TermMatrix:
    return TermMatrix.from_titles(catalog.each("title"))


def tie_order(catalog: Catalog) -> NDArray[np.int64]:  # -> [I]
    """Return each item's place among ties, by a hash of its id: adjacent ids are often similar."""
    hashes = (zlib.crc32(item_id.encode()) for item_id in catalog.each("item_id"))
    order = np.argsort(np.fromiter(hashes, np.uint32, catalog.num_items), kind="stable")
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    return places


def block_scores(ranker: Ranker, block: pa.Table) -> ScoreBlock:
    """Return the scores of a block; those of a ranker on a GPU stay there."""
    if isinstance(ranker, DeviceRanker):
        values = ranker.score_on_device(block)
        return ArrayScores(values.numpy()) if values.device.type == "cpu" else TensorScores(values)
    return ArrayScores(np.asarray(ranker.score(block)))


class Measurement:
    """One pass over the examples: `run` fills it, `metrics` and `details` read it."""

    def __init__(
        self,
        examples: pa.Table,
        catalog: Catalog,
        config: EvaluationConfig,
        query_matches: QueryMatches,
    ) -> None:
        self.examples, self.config, self.query_matches = examples, config, query_matches
        self.num_items = catalog.num_items
        self.targets = catalog.rows(examples.column("positive_item_id").combine_chunks())  # [n]
        self.queries = examples.column("query").to_pylist()
        self.requests = request_numbers(examples)  # [n]
        self.pairs = impressions(examples, self.requests, catalog)
        self.terms = catalog.derived(_title_terms)
        self.priority = catalog.derived(tie_order)  # [I]
        size = config.corpus_size()
        self.left_out = self.priority >= size if 0 < size < self.num_items else None  # [I]
        num = examples.num_rows
        self.ranks = np.zeros(num, dtype=np.int64)
        self.query_ranks = np.zeros(num, dtype=np.int64)
        self.js, self.js_excl = np.zeros(num), np.zeros(num)
        self.pair_scores = np.zeros(len(self.pairs.row), dtype=np.float64)

    def run(self, ranker: Ranker, workers: Workers = ALONE) -> None:
        """Score every block, or this worker's share, and keep what the metrics need of all."""
        num, size = self.examples.num_rows, _rows_at_once(self.config.block_size, self.num_items)
        started = reported = time.monotonic()
        for number, counts in workers.share(-(-num // size)):
            start = number * size
            block = self.examples.slice(start, size)
            scores = block_scores(ranker, block)
            assert scores.shape == (block.num_rows, self.num_items), "a ranker scores all items"
            if scores.has_nan():
                raise KarmaRayError(f"{type(ranker).__name__}: NaN among the scores")
            if counts:
                self._take(start, scores)
            if time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                done = start + block.num_rows
                logger.info("evaluated %d of %d examples, %.0f s", done, num, reported - started)
        # Every value is zero but with the worker that scored its block.
        self.ranks, self.query_ranks, self.js, self.js_excl, self.pair_scores = map(
            workers.add, self.values
        )

    @property
    def values(self) -> list[NDArray[Any]]:
        """What workers add up, in this order."""
        return [self.ranks, self.query_ranks, self.js, self.js_excl, self.pair_scores]

    def _take(self, start: int, scores: ScoreBlock) -> None:  # scores [b, I]
        here = slice(start, start + scores.shape[0])
        targets, mode = self.targets[here], self.config.js_mode
        corpus = scores if self.left_out is None else scores.without(self.left_out, targets)
        self.ranks[here] = corpus.pessimistic_ranks(targets)
        best = corpus.top_rows(JS_DEPTH + 1, targets, self.priority)
        self.js[here] = self.terms.jaccard(targets, best[:, :JS_DEPTH], mode)
        self.js_excl[here] = self.terms.jaccard(targets, without_truth(targets, best), mode)
        inside: dict[int, NDArray[np.int64]] = {}
        for row, target in enumerate(targets):
            if target >= 0 and self.queries[start + row]:
                matching = self.query_matches.rows(self.queries[start + row])
                if len(matching) < self.num_items and target in matching:
                    inside[row] = matching
        rows = np.array([*inside], dtype=np.int64)
        ranks = scores.ranks_within(rows, targets[rows], [*inside.values()])
        self.query_ranks[start + rows] = ranks
        first, last = np.searchsorted(self.pairs.example, [here.start, here.stop])
        at = self.pairs.example[first:last] - start
        self.pair_scores[first:last] = scores.at(at, self.pairs.row[first:last])

    def metrics(
        self, warm: NDArray[np.bool_], held_out: NDArray[np.bool_] | None = None
    ) -> dict[str, float]:
        """Return the averages over all examples and over every section."""
        known = self.targets >= 0
        is_warm = known & warm[np.where(known, self.targets, 0)]
        repeat, pairs = is_repeat(self.examples), self.pairs
        sections = {
            "": (np.ones(len(known), dtype=bool), np.ones(len(pairs.row), dtype=bool)),
            "warm/": (is_warm, warm[pairs.row]),
            "cold/": (~is_warm, ~warm[pairs.row]),
            "first/": (~repeat, ~pairs.seen),
            "repeat/": (repeat, pairs.seen),
        }
        if held_out is not None:
            is_held_out = known & held_out[np.where(known, self.targets, 0)]
            sections["held_out/"] = (is_held_out, held_out[pairs.row])
        result: dict[str, float] = {}
        for prefix, (examples, clicks) in sections.items():
            section = self._section(examples, clicks | ~pairs.clicked)
            result.update({prefix + name: value for name, value in section.items()})
        result["num_unknown_target"] = int(np.count_nonzero(~known))
        inside = self.query_ranks > 0
        within = self._rank_metrics(self.query_ranks, inside)
        result.update({f"in_query/{name}": value for name, value in within.items()})
        result["in_query/num_outside"] = int(np.count_nonzero(~inside))
        return result

    def _section(self, mask: NDArray[np.bool_], judged: NDArray[np.bool_]) -> dict[str, float]:
        if not mask.any():
            return {"num_test": 0, "num_gauc_groups": 0}
        result = self._rank_metrics(self.ranks, mask)
        result["JS@50"] = 100.0 * float(self.js[mask].mean())
        result["JS@50_excl_gt"] = 100.0 * float(self.js_excl[mask].mean())
        groups = self._groups(judged)
        if len(groups.auc):
            weights = groups.weights(self.config.gauc_weight)
            result["gAUC"] = 100.0 * float(np.average(groups.auc, weights=weights))
        result["num_gauc_groups"] = len(groups.auc)
        return result

    def _groups(self, judged: NDArray[np.bool_]) -> ranking.GroupAuc:
        pairs = self.pairs
        return ranking.group_auc(
            self.pair_scores[judged], pairs.clicked[judged], pairs.request[judged]
        )

    def _rank_metrics(self, ranks: NDArray[np.int64], mask: NDArray[np.bool_]) -> dict[str, float]:
        """Return HR, NDCG and MRR over the masked examples, per click or per request."""
        values = ranks[mask]
        if not len(values):
            return {"num_test": 0}
        if self.config.hr_unit == "any_hit":
            best = np.full(int(self.requests.max()) + 1, -1, dtype=np.int64)
            best[self.requests[mask]] = ranking.MISS
            np.minimum.at(best, self.requests[mask], values)
            values = best[best >= 0]
        result: dict[str, float] = {"num_test": len(values)}
        for k in CUTOFFS:
            result[f"HR@{k}"] = ranking.hit_rate(values, k)
        result["NDCG@10"] = 100.0 * float(ranking.ndcg(values).mean())
        result["MRR"] = 100.0 * float(ranking.reciprocal_rank(values).mean())
        return result

    def details(self, sample: NDArray[np.int64]) -> EvaluationDetails:
        """Return the values per example and per judged request."""
        users = self.examples.column("user_id").to_pylist()
        groups = self._groups(np.ones(len(self.pairs.row), dtype=bool))
        first = dict(zip(self.pairs.request.tolist(), self.pairs.example.tolist(), strict=True))
        return EvaluationDetails(
            rows=sample,
            user_ids=users,
            ranks=self.ranks,
            query_ranks=self.query_ranks,
            js=self.js,
            js_excl_gt=self.js_excl,
            group_user_ids=[users[first[request]] for request in groups.groups.tolist()],
            group_auc=groups.auc,
            group_weights=groups.weights(self.config.gauc_weight),
        )

"""Measurement of a ranker: one pass over the examples in blocks, values per example, and means.

Memory is proportional to block x catalogue, never to users x items. The scores of a block are
dropped after ranks, term overlap and the scores of its pages have been computed.
Legend: n examples, b of them in a block, I items, G judged requests.
"""

from __future__ import annotations

import logging
import time
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from karma_ray.baselines.ranker import Ranker
from karma_ray.data.catalog import Catalog
from karma_ray.errors import KarmaRayError
from karma_ray.evaluation.config import EvaluationConfig
from karma_ray.evaluation.impressions import impressions, is_repeat, request_numbers
from karma_ray.metrics import ranking
from karma_ray.metrics.semantic import TermMatrix, without_truth

if TYPE_CHECKING:
    from karma_ray.data.prepared import QueryMatches

logger = logging.getLogger(__name__)

CUTOFFS = (10, 50, 200, 1000)
JS_DEPTH = 50
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
        self.targets = catalog.rows(examples.column("positive_item_id").to_pylist())  # [n]
        self.queries = examples.column("query").to_pylist()
        self.requests = request_numbers(examples)  # [n]
        self.pairs = impressions(examples, self.requests, catalog)
        self.terms = TermMatrix.from_titles(catalog.titles)
        # Ties in a top list are ordered by a hash of the id, as adjacent ids are often similar.
        hashes = [zlib.crc32(item_id.encode()) for item_id in catalog.item_ids]
        self.priority = np.argsort(np.argsort(hashes, kind="stable"))  # [I]
        size = config.corpus_size()
        self.left_out = self.priority >= size if 0 < size < self.num_items else None  # [I]
        num = examples.num_rows
        self.ranks = np.zeros(num, dtype=np.int64)
        self.query_ranks = np.zeros(num, dtype=np.int64)
        self.js, self.js_excl = np.zeros(num), np.zeros(num)
        self.pair_scores = np.zeros(len(self.pairs.row), dtype=np.float64)

    def run(self, ranker: Ranker) -> None:
        """Score every block, and keep what the metrics need."""
        num, size = self.examples.num_rows, self.config.block_size
        started = reported = time.monotonic()
        for start in range(0, num, size):
            block = self.examples.slice(start, size)
            scores = np.asarray(ranker.score(block))
            assert scores.shape == (block.num_rows, self.num_items), "a ranker scores all items"
            if np.isnan(scores).any():
                raise KarmaRayError(f"{type(ranker).__name__}: NaN among the scores")
            self._take(start, scores)
            if time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                done = start + block.num_rows
                logger.info("evaluated %d of %d examples, %.0f s", done, num, reported - started)

    def _take(self, start: int, scores: NDArray[np.floating]) -> None:  # scores [b, I]
        here = slice(start, start + len(scores))
        targets, mode = self.targets[here], self.config.js_mode
        corpus = self._within_corpus(scores, targets)
        self.ranks[here] = ranking.pessimistic_ranks(corpus, targets)
        best = ranking.top_rows(corpus, JS_DEPTH + 1, targets, self.priority)
        self.js[here] = self.terms.jaccard(targets, best[:, :JS_DEPTH], mode)
        self.js_excl[here] = self.terms.jaccard(targets, without_truth(targets, best), mode)
        for row, target in enumerate(targets):
            if target >= 0 and self.queries[start + row]:
                matching = self.query_matches.rows(self.queries[start + row])
                if len(matching) < self.num_items and target in matching:
                    rank = ranking.rank_within(scores[row], int(target), matching)
                    self.query_ranks[start + row] = rank
        first, last = np.searchsorted(self.pairs.example, [start, start + len(scores)])
        at = self.pairs.example[first:last] - start
        self.pair_scores[first:last] = scores[at, self.pairs.row[first:last]]

    def _within_corpus(
        self, scores: NDArray[np.floating], targets: NDArray[np.int64]
    ) -> NDArray[np.floating]:  # [b, I], [b] -> [b, I]
        """Return the scores with items outside `evaluation.corpus`, except the target, last."""
        if self.left_out is None:
            return scores
        known = np.flatnonzero(targets >= 0)
        corpus = np.where(self.left_out, -np.inf, scores)
        corpus[known, targets[known]] = scores[known, targets[known]]
        return corpus

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
            result[f"HR@{k}"] = 100.0 * float(ranking.hit(values, k).mean())
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

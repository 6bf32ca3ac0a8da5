"""The pre-ranking stage: which of some thousand candidates go on to the ranker (method 1.13, ASH).

Candidates are the first of the matching output, the same for every run. The pre-ranker without
KARMA is z(affinity) and z(log(1 + training clicks)), blended with a weight that validation chooses;
KARMA's score is fused with it by another such weight. HR is the share of clicked items that are
kept; a click on an item outside the candidates counts as lost, under every score alike.

Legend: b requests of a block, P candidates of each, m judged pairs, W weights.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from karma_ray.evaluation.measurement import block_scores
from karma_ray.funnel.fusion import GRID, best_weight, fused, places, ranks, standardised
from karma_ray.funnel.matching import SECONDS, Matched, Matching
from karma_ray.funnel.outcomes import UserSums
from karma_ray.funnel.requests import Clicks
from karma_ray.retrieval.retriever import Retriever

LOG = logging.getLogger(__name__)
Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Both = Callable[[Clicks, slice], tuple[Floats, Floats, Rows]]
"""The two standardised scores [b, P] of a block and its candidates [b, P]."""


class PreRanker:
    """The scores of a block's candidates, without KARMA and by a run."""

    def __init__(self, matching: Matching, weight: float = 0.0) -> None:
        """`weight` is that of popularity beside affinity."""
        self.matching, self.weight = matching, weight
        self._popularity = np.log1p(matching.clicks)  # [I]

    def parts(self, clicks: Clicks, block: slice) -> tuple[Floats, Floats, Rows]:
        """Return z(affinity), z(popularity) and the candidates."""
        matched = self.matching.block(clicks, block)
        pool = self._pool(matched)
        popularity = standardised(self._popularity[pool])
        return standardised(matched.affinity), popularity, pool

    def beside(self, retriever: Retriever) -> Both:
        """Return what gives z(s_pre), z(s_karma) and the candidates of a block."""

        def both(clicks: Clicks, block: slice) -> tuple[Floats, Floats, Rows]:
            own, pool = self.own(clicks, block)
            scores = block_scores(retriever, clicks.examples.slice(block.start, len(pool)))
            request = np.repeat(np.arange(len(pool)), pool.shape[1])
            values = np.asarray(scores.at(request, pool.ravel())).reshape(pool.shape)
            return own, standardised(values), pool

        return both

    def own(self, clicks: Clicks, block: slice) -> tuple[Floats, Rows]:
        """Return z(s_pre) and the candidates."""
        left, right, pool = self.parts(clicks, block)
        return standardised(fused(left, right, self.weight)), pool

    def _pool(self, matched: Matched) -> Rows:
        return matched.rows[:, : self.matching.sizes.pool]


def chosen_blend(matching: Matching, valid: Clicks) -> tuple[PreRanker, list[float]]:
    """Return the pre-ranker whose weight of popularity is best on validation, and all rates."""
    parts = PreRanker(matching).parts
    rates = validation_rates(parts, valid, matching.sizes.kept, "pre-ranker")
    return PreRanker(matching, best_weight(rates)), rates.tolist()


def validation_rates(both: Both, valid: Clicks, kept: int, what: str) -> Floats:  # -> [W]
    """Return HR of every weight of the grid on validation, in percent."""
    hits, last = np.zeros(len(GRID)), time.monotonic()
    for block in valid.blocks():
        left, right, pool = both(valid, block)
        request = np.arange(len(pool))
        place = places(pool, request, valid.targets[block])
        for number, weight in enumerate(GRID):
            found = ranks(fused(left, right, weight), request, place)
            hits[number] += np.count_nonzero(found <= kept)
        if time.monotonic() - last > SECONDS:
            last = time.monotonic()
            LOG.info("%s: %d of %d validation clicks", what, block.stop, len(valid.targets))
    rates: Floats = 100.0 * hits / len(valid.targets)
    return rates


def others_prerank(pre: PreRanker, test: Clicks) -> UserSums:
    """Measure the pre-ranker without KARMA (w = 0), and the share of clicks among candidates."""

    def both(clicks: Clicks, block: slice) -> tuple[Floats, Floats, Rows]:
        own, pool = pre.own(clicks, block)
        return own, np.zeros_like(own), pool

    return _measured(both, 0.0, test, pre.matching.sizes.kept)


def run_prerank(
    retriever: Retriever, pre: PreRanker, valid: Clicks, test: Clicks
) -> tuple[UserSums, dict[str, Any]]:
    """Choose w on validation and measure it on test; returns sums per user, w and the rates."""
    both, kept = pre.beside(retriever), pre.matching.sizes.kept
    rates = validation_rates(both, valid, kept, "pre-ranking")
    weight = best_weight(rates)
    return _measured(both, weight, test, kept), {"w": weight, "valid_rates": rates.tolist()}


def _measured(both: Both, weight: float, test: Clicks, kept: int) -> UserSums:
    parts: dict[str, list[Floats]] = {"kept": [], "all_scene": [], "pool": []}
    for block in test.blocks():
        left, right, pool = both(test, block)
        scores, request = fused(left, right, weight), np.arange(len(pool))
        place = places(pool, request, test.targets[block])
        parts["pool"].append((place >= 0).astype(np.float64))
        parts["kept"].append((ranks(scores, request, place) <= kept).astype(np.float64))
        pairs = test.scene_of(block)
        at = test.scene[pairs] - block.start
        found = ranks(scores, at, places(pool, at, test.scene_items[pairs])) <= kept
        parts["all_scene"].append(np.bincount(at, found, len(pool)) / np.bincount(at))
    return UserSums.of(test.users, {name: np.concatenate(part) for name, part in parts.items()})

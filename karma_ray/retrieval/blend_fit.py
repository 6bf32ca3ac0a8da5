"""Weights of a blend, fitted on validation requests alone.

The logistic model says P(click on i) = exp(w . f_i) / sum over candidates of exp(w . f_c), and its
likelihood is maximised with a small quadratic penalty. No weight of a list may be below 0, so that
being found by one more list never harms an item. Reciprocal rank fusion is the same with the ranks
as features. Which of them serves, if any, is decided by HR@50 of users that the weights were not
fitted on, in two halves; the weights that serve are then fitted on all users.

Legend: B requests, C candidates of all requests, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from scipy.optimize import minimize

from karma_ray.data.draws import text_keys
from karma_ray.metrics import ranking
from karma_ray.metrics.significance import paired_bootstrap
from karma_ray.retrieval.blend import (
    DENSE,
    FEATURES,
    FREE,
    GROUPS,
    LISTS,
    OF_LIST,
    RANK_OFFSET,
    RECIPROCAL,
    SCORES,
    Blend,
)
from karma_ray.retrieval.blended import BlendedSearch
from karma_ray.retrieval.channels import DEPTH, Channels
from karma_ray.retrieval.filters import Filter, filtered_search

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from karma_ray.retrieval.blended import Found
    from karma_ray.retrieval.retriever import Retriever

    Numbers = NDArray[np.int64]
    Mask = NDArray[np.bool_]

MAX_REQUESTS = 2000
"""Validation requests that weights are fitted on, a sample drawn from a fixed seed."""
FEWEST = 100
"""Found clicks below which a group of requests has the weights of all."""
PENALTY = 1e-3
METRIC_DEPTH = 50
"""K of the HR@K that decides; a tenth of the items where these are fewer than 500."""
KINDS = {"logistic": SCORES, "reciprocal_ranks": RECIPROCAL}
UNFITTED = Blend(DENSE, {group: {DENSE: 1.0} for group in GROUPS})
"""The model alone."""
_BATCH = 64


@dataclass(frozen=True)
class Gathered:
    """Candidates of requests whose clicks are known."""

    features: NDArray[np.float64]  # [C, F]
    ends: Numbers  # [B + 1]
    target: Numbers  # [B] place of the clicked item among all candidates, -1 if no list has it
    is_warm: Mask  # [B]
    half: Numbers  # [B] 0 or 1, by user
    users: Sequence[str | None]

    @classmethod
    def of(cls, retriever: Retriever, channels: Channels, examples: pa.Table) -> Gathered:
        """Search for rows of `examples` by all lists."""
        search = BlendedSearch.of(channels, UNFITTED, retriever)
        ids = examples.column("positive_item_id").to_pylist()
        targets = search.order.of_index(retriever.table.rows(ids))
        parts, places, warm, count = [], [], [], 0
        for target, (found, _) in zip(targets, search_examples(retriever, search, examples),
                                      strict=True):  # fmt: skip
            place = int(np.searchsorted(found.rows, target))
            there = place < len(found.rows) and found.rows[place] == target
            places.append(count + place if there else -1)
            parts.append(found.features)
            warm.append(found.group == GROUPS[0])
            count += len(found.rows)
        users = examples.column("user_id").to_pylist()
        half = text_keys([user or "" for user in users]) & 1
        ends = np.cumsum([0, *map(len, parts)])
        return cls(np.concatenate(parts), ends, np.array(places, np.int64), np.array(warm, bool),
                   half, users)  # fmt: skip

    def ranks(self, blend: Blend, without: str | None = None) -> Numbers:  # -> [B]
        """Return the place of each click in what is served: by score, then the model's, then row.

        `without` names a list whose finds do not count, unless another list has them too.
        """
        vectors = np.stack([blend.vector(group) for group in GROUPS])
        scores = np.empty(len(self.features))
        for request in range(len(self.target)):
            here = slice(self.ends[request], self.ends[request + 1])
            scores[here] = self.features[here] @ vectors[0 if self.is_warm[request] else 1]
        if without is not None:
            others = [FEATURES.index(f"rank_{name}") for name in LISTS if name != without]
            scores[~self.features[:, others].any(1)] = -np.inf
        keys = scores, self.features[:, FEATURES.index(DENSE)], -np.arange(len(scores))
        ahead = np.zeros(len(scores), bool)
        equal = np.ones(len(scores), bool)
        for key in keys:
            own = np.repeat(key[np.maximum(self.target, 0)], np.diff(self.ends))
            ahead |= equal & (key > own)
            equal &= key == own
        places = np.add.reduceat(ahead, self.ends[:-1], dtype=np.int64) + 1
        there = (self.target >= 0) & (scores[np.maximum(self.target, 0)] > -np.inf)
        found: Numbers = np.where(there, places, ranking.MISS)
        return found

    def ranks_in(self, name: str) -> Numbers:  # -> [B]
        """Return the rank of each click in one of the lists."""
        column = self.features[np.maximum(self.target, 0), FEATURES.index(f"rank_{name}")]
        there = (self.target >= 0) & (column > 0)
        ranks = np.rint(1.0 / np.where(there, column, 1.0) - RANK_OFFSET).astype(np.int64)
        found: Numbers = np.where(there, ranks, ranking.MISS)
        return found


def search_examples(
    retriever: Retriever, search: BlendedSearch, examples: pa.Table
) -> Iterator[tuple[Found, tuple[list[int], list[float]]]]:
    """Yield the candidates of each row of `examples`, and the model's list beside them."""
    for start in range(0, examples.num_rows, _BATCH):
        some = examples.slice(start, _BATCH)
        vectors = retriever.vectors_of(some)
        depths, filters = [DEPTH] * some.num_rows, [Filter()] * some.num_rows
        dense = filtered_search(retriever.index, vectors, filters, depths)
        columns = (some.column(name).to_pylist() for name in ("query", "history_item_ids"))
        for vector, query, ids, best in zip(vectors, *columns, dense, strict=True):
            history = search.history(ids or [], retriever)
            allowed = search.allowed(retriever, Filter())
            yield search.found(retriever, vector, query, history, best[0], allowed), best


def fitted_blend(retriever: Retriever, channels: Channels, valid: pa.Table) -> Blend:
    """Fit weights on validation examples, and say whether the blend should be served.

    It is, if the 95 % interval over users of the gain in HR@50 over the model alone lies above 0:
    it costs time at every request, so it must be known to be worth it.
    """
    if valid.num_rows > MAX_REQUESTS:
        picked = np.random.default_rng(0).permutation(valid.num_rows)[:MAX_REQUESTS]
        valid = valid.take(pa.array(np.sort(picked)))
    if valid.num_rows == 0:
        return UNFITTED
    data = Gathered.of(retriever, channels, valid)
    if np.count_nonzero(data.target >= 0) < FEWEST:
        return UNFITTED
    dense = data.ranks_in(DENSE)
    held_out = {kind: _held_out_ranks(data, kind) for kind in KINDS}
    depth = min(METRIC_DEPTH, max(1, channels.num_items // 10))
    rates = {kind: ranking.hit_rate(ranks, depth) for kind, ranks in held_out.items()}
    best = max(KINDS, key=lambda kind: rates[kind])
    gain = paired_bootstrap(
        100 * ranking.hit(held_out[best], depth), 100 * ranking.hit(dense, depth),
        data.users, seed=0,
    )  # fmt: skip
    measured: dict[str, Any] = {
        "requests": len(data.target), "depth": depth,
        "HR": {DENSE: ranking.hit_rate(dense, depth), **rates},
        "gain": gain.difference, "low": gain.low, "high": gain.high,
    }  # fmt: skip
    everyone = np.ones(len(data.target), bool)
    some = np.arange(len(everyone)) < MAX_REQUESTS // 2
    without = {
        name: _weights(data, [f for f in KINDS[best] if f not in OF_LIST[name]], some)
        for name in LISTS
    }
    return Blend(best, _weights(data, KINDS[best], everyone), gain.low > 0, measured, without)


def _held_out_ranks(data: Gathered, kind: str) -> Numbers:  # -> [B]
    """Return the ranks of each half of the users with the weights of the other half."""
    ranks = np.full(len(data.target), ranking.MISS, np.int64)
    for half in (0, 1):
        if (data.half == half).all():  # a single user has no other half
            return ranks
        blend = Blend(kind, _weights(data, KINDS[kind], data.half != half))
        ranks = np.where(data.half == half, data.ranks(blend), ranks)
    return ranks


def _weights(data: Gathered, names: Sequence[str], some: Mask) -> dict[str, dict[str, float]]:
    """Fit the weights of both groups on some requests; a small group has those of all."""
    found = some & (data.target >= 0)
    groups = {GROUPS[0]: found & data.is_warm, GROUPS[1]: found & ~data.is_warm}
    shared = None
    result = {}
    for group, mask in groups.items():
        if np.count_nonzero(mask) >= FEWEST:
            weights = maximum_likelihood(data, names, mask)
        elif shared is None:
            weights = shared = maximum_likelihood(data, names, found)
        else:
            weights = shared
        result[group] = dict(zip(names, weights.tolist(), strict=True))
    return result


def maximum_likelihood(
    data: Gathered, names: Sequence[str], mask: Mask
) -> NDArray[np.float64]:  # [B] -> [F]
    """Return the weights of some features that make the clicks of some requests most likely."""
    requests = np.flatnonzero(mask)
    if not len(requests):
        return np.array([float(name in (DENSE, f"rank_{DENSE}")) for name in names])
    sizes = np.diff(data.ends)[requests]
    starts = np.cumsum(sizes) - sizes
    rows = np.repeat(data.ends[requests] - starts, sizes) + np.arange(sizes.sum())
    columns = np.array([FEATURES.index(name) for name in names])
    x = data.features[np.ix_(rows, columns)]
    deviation = x.std(0)
    deviation[deviation == 0] = 1.0
    x /= deviation
    clicked = data.target[requests] - data.ends[requests] + starts
    of_clicks = x[clicked].sum(0)

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits = x @ weights
        highest = np.maximum.reduceat(logits, starts)
        powers = np.exp(logits - np.repeat(highest, sizes))
        totals = np.add.reduceat(powers, starts)
        likely = (logits[clicked] - highest - np.log(totals)).sum() / len(requests)
        expected = (powers / np.repeat(totals, sizes)) @ x
        slope = (of_clicks - expected) / len(requests) - PENALTY * weights
        return PENALTY / 2 * float(weights @ weights) - float(likely), -slope

    bounds = [(None, None) if name in FREE else (0.0, None) for name in names]
    found = minimize(loss, np.zeros(len(names)), jac=True, method="L-BFGS-B", bounds=bounds)
    weights: NDArray[np.float64] = found.x / deviation
    return weights

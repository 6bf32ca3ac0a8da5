"""Ranks and the metrics computed from them: HR@K, NDCG, MRR and gAUC, as in method 1.13.

Functions return one value per example (or group); the caller averages and multiplies by 100.
Legend: b requests, I items of the catalogue, n judged (request, item) pairs, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

MISS = np.iinfo(np.int64).max
"""Rank of a target that is not in the catalogue; it is worse than every cutoff."""

GroupWeight = Literal["impressions", "positives", "uniform"]
Scores = NDArray[np.floating]


def pessimistic_ranks(scores: Scores, targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rank of each target, with ties counted against it.  # [b, I], [b] -> [b]

    Rank 1 is best. A target of -1 (unknown) gets `MISS`. A NaN score, of the target or another
    item, counts against the target too.
    """
    known = targets >= 0
    own = np.take_along_axis(scores, np.where(known, targets, 0)[:, None], axis=1)
    ranks = scores.shape[1] - np.count_nonzero(scores < own, axis=1)
    return np.where(known, ranks, MISS).astype(np.int64)


def rank_within(
    scores: Scores, target: int, rows: NDArray[np.int64]
) -> int:  # [I], scalar, [M] -> scalar
    """Return the pessimistic rank of `target` among `rows` only, which must contain it."""
    return len(rows) - int(np.count_nonzero(scores[rows] < scores[target]))


def hit(ranks: NDArray[np.int64], k: int) -> NDArray[np.float64]:  # [n] -> [n]
    """Return HR@K per example: 1 if the target is in the top K."""
    return (ranks <= k).astype(np.float64)


def hit_rate(ranks: NDArray[np.int64], k: int) -> float:  # [n] -> scalar
    """Return the mean of HR@K, in percent."""
    return 100.0 * float(hit(ranks, k).mean())


def ndcg(ranks: NDArray[np.int64], k: int = 10) -> NDArray[np.float64]:  # [n] -> [n]
    """Return NDCG@K with one relevant item: 1 / log2(1 + rank) in the top K, else 0."""
    gains = np.asarray(1.0 / np.log2(1.0 + ranks.astype(np.float64)))
    return np.where(ranks <= k, gains, 0.0)


def reciprocal_rank(ranks: NDArray[np.int64]) -> NDArray[np.float64]:  # [n] -> [n]
    """Return the reciprocal rank per example, without cutoff; a miss gives 0."""
    return np.where(ranks == MISS, 0.0, 1.0 / ranks)


def top_rows(
    scores: Scores, k: int, targets: NDArray[np.int64], priority: NDArray[np.int64]
) -> NDArray[np.int64]:  # [b, I], k, [b], [I] -> [b, min(k, I)]
    """Return the k best columns of each request, best first.

    Ties are ordered by `priority` (lower first; a property of the item, so that the order of the
    catalogue has no effect), with the target last. The target is therefore retrieved exactly if
    its pessimistic rank is at most k. Scores must not be NaN.
    """
    num_items = scores.shape[1]
    k = min(k, num_items)
    threshold = np.partition(scores, num_items - k, axis=1)[:, num_items - k]
    chosen = np.empty((len(scores), k), dtype=np.int64)
    for row, (values, bound, target) in enumerate(zip(scores, threshold, targets, strict=True)):
        above, tied = np.flatnonzero(values > bound), np.flatnonzero(values == bound)
        places = k - len(above)
        if len(tied) > places:
            turn = np.where(tied == target, num_items, priority[tied])
            tied = tied[np.argpartition(turn, places - 1)[:places]]
        chosen[row] = np.concatenate([above, tied])
    turn = np.where(chosen == targets[:, None], num_items, priority[chosen])
    order = np.lexsort((turn, -np.take_along_axis(scores, chosen, axis=1)), axis=-1)
    return np.take_along_axis(chosen, order, axis=1)


@dataclass(frozen=True)
class GroupAuc:
    """AUC of every group with at least one click and one non-click, all [G]."""

    groups: NDArray[np.int64]
    auc: NDArray[np.float64]
    num_positives: NDArray[np.int64]
    num_negatives: NDArray[np.int64]

    def weights(self, weight: GroupWeight) -> NDArray[np.float64]:  # -> [G]
        """w_g: the group's impressions (DIN), its positives (HLLM, RecBole), or 1."""
        if weight == "impressions":
            return (self.num_positives + self.num_negatives).astype(np.float64)
        if weight == "positives":
            return self.num_positives.astype(np.float64)
        return np.ones(len(self.auc))


def group_auc(
    scores: Scores, labels: NDArray[np.bool_], groups: NDArray[np.int64]
) -> GroupAuc:  # [n], [n], [n] -> [G]
    """Compute AUC_g = P(s+ > s-) + 0.5 P(s+ = s-) from tied ranks (Mann-Whitney) of all groups."""
    order = np.lexsort((scores, groups))
    score, label, group = scores[order], labels[order].astype(np.int64), groups[order]
    if not len(score):
        none = np.zeros(0, dtype=np.int64)
        return GroupAuc(none, np.zeros(0), none, none)
    new_group = np.concatenate([[True], group[1:] != group[:-1]])
    new_tie = new_group | np.concatenate([[True], score[1:] != score[:-1]])
    start = np.flatnonzero(new_group)
    size = np.diff(np.append(start, len(score)))
    tie_start = np.flatnonzero(new_tie)
    tie_size = np.diff(np.append(tie_start, len(score)))
    # Twice the mean rank within the group: these are integers, so ties are exact.
    first = tie_start - np.repeat(start, np.add.reduceat(new_tie.astype(np.int64), start))
    twice_rank = np.repeat(2 * first + tie_size + 1, tie_size)
    positives = np.add.reduceat(label, start)
    negatives = size - positives
    twice_sum = np.add.reduceat(twice_rank * label, start)
    valid = (positives > 0) & (negatives > 0)
    positives, negatives = positives[valid], negatives[valid]
    wins = twice_sum[valid] - positives * (positives + 1)
    return GroupAuc(group[start][valid], wins / (2.0 * positives * negatives), positives, negatives)

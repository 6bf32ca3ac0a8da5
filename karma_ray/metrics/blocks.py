"""The scores of a block of requests, and what the metrics need of them, where the scores are.

Scores in memory go through `ranking`. Those on a GPU stay there: ranks and top lists are computed
by the same rules, and only these come back.

Legend: b requests of the block, I items of the catalogue, m chosen requests, M rows of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from karma_ray.metrics import ranking

Rows = NDArray[np.int64]


class ScoreBlock(Protocol):
    """Scores [b, I]; functions of the same name in `ranking` say what is returned."""

    @property
    def shape(self) -> tuple[int, int]:
        """b and I."""

    def has_nan(self) -> bool:
        """Whether any score is NaN."""

    def without(self, left_out: NDArray[np.bool_], targets: Rows) -> ScoreBlock:
        """Return scores with the items `left_out` [I], except each request's target, last."""

    def pessimistic_ranks(self, targets: Rows) -> Rows:  # [b] -> [b]
        """Return the rank of each target."""

    def top_rows(self, k: int, targets: Rows, priority: Rows) -> Rows:  # -> [b, min(k, I)]
        """Return the k best columns of each request, best first."""

    def ranks_within(self, requests: Rows, targets: Rows, rows: Sequence[Rows]) -> Rows:  # [m]
        """Return the rank of each chosen request's target among its own `rows` only."""

    def at(self, requests: Rows, columns: Rows) -> NDArray[np.floating]:  # [n], [n] -> [n]
        """Return single scores."""


@dataclass(frozen=True)
class ArrayScores:
    """Scores in this process's memory."""

    values: NDArray[np.floating]

    @property
    def shape(self) -> tuple[int, int]:
        """b and I."""
        return self.values.shape[0], self.values.shape[1]

    def has_nan(self) -> bool:
        """Whether any score is NaN."""
        return bool(np.isnan(self.values).any())

    def without(self, left_out: NDArray[np.bool_], targets: Rows) -> ArrayScores:
        """Return scores with the items `left_out`, except each request's target, last."""
        known = np.flatnonzero(targets >= 0)
        kept = np.where(left_out, -np.inf, self.values)
        kept[known, targets[known]] = self.values[known, targets[known]]
        return ArrayScores(kept)

    def pessimistic_ranks(self, targets: Rows) -> Rows:
        """Return the rank of each target."""
        return ranking.pessimistic_ranks(self.values, targets)

    def top_rows(self, k: int, targets: Rows, priority: Rows) -> Rows:
        """Return the k best columns of each request, best first."""
        return ranking.top_rows(self.values, k, targets, priority)

    def ranks_within(self, requests: Rows, targets: Rows, rows: Sequence[Rows]) -> Rows:
        """Return the rank of each chosen request's target among its own rows only."""
        chosen = zip(requests, targets, rows, strict=True)
        ranks = [ranking.rank_within(self.values[r], int(t), own) for r, t, own in chosen]
        return np.array(ranks, dtype=np.int64)

    def at(self, requests: Rows, columns: Rows) -> NDArray[np.floating]:
        """Return single scores."""
        return self.values[requests, columns]


@dataclass(frozen=True)
class TensorScores:
    """Scores on a device."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """b and I."""
        return self.values.shape[0], self.values.shape[1]

    def has_nan(self) -> bool:
        """Whether any score is NaN."""
        return bool(torch.isnan(self.values).any())

    def without(self, left_out: NDArray[np.bool_], targets: Rows) -> TensorScores:
        """Return scores with the items `left_out`, except each request's target, last."""
        kept = self.values.masked_fill(self._here(left_out), -torch.inf)
        known = np.flatnonzero(targets >= 0)
        places = self._here(known), self._here(targets[known])
        kept[places] = self.values[places]
        return TensorScores(kept)

    def pessimistic_ranks(self, targets: Rows) -> Rows:
        """Return the rank of each target."""
        own = self.values.gather(1, self._here(np.maximum(targets, 0))[:, None])
        ranks = self.shape[1] - (self.values < own).sum(1).cpu().numpy()
        return np.where(targets >= 0, ranks, ranking.MISS).astype(np.int64)

    def top_rows(self, k: int, targets: Rows, priority: Rows) -> Rows:
        """Return the k best columns of each request, best first.

        Candidates are those of a plain top k and, of the items that tie with its last, the k whose
        turn is first. They are ordered in memory, as they are few.
        """
        num, num_items = self.shape
        k = min(k, num_items)
        values, columns = torch.topk(self.values, k)
        bound = values[:, -1:]
        by_turn = self._here(priority.astype(np.int32))
        turns = by_turn.repeat(num, 1)
        turns.scatter_(1, self._here(np.maximum(targets, 0))[:, None], num_items)
        turns[self._here(targets < 0)] = by_turn
        tied = torch.where(self.values == bound, turns, num_items + 1)
        turn, places = torch.topk(tied, k, largest=False)
        above = torch.where(values > bound, turns.gather(1, columns), num_items + 1)
        scores = torch.cat([values, bound.expand(-1, k)], 1)
        turn = torch.cat([above, turn], 1)
        scores = scores.masked_fill(turn > num_items, -torch.inf)
        order = np.lexsort((turn.cpu().numpy(), -scores.cpu().numpy()), axis=-1)[:, :k]
        found: Rows = np.take_along_axis(torch.cat([columns, places], 1).cpu().numpy(), order, 1)
        return found

    def ranks_within(self, requests: Rows, targets: Rows, rows: Sequence[Rows]) -> Rows:
        """Return the rank of each chosen request's target among its own rows only."""
        sizes = np.array([len(own) for own in rows], dtype=np.int64)
        if not len(sizes):
            return sizes
        owner = self._here(np.repeat(np.arange(len(sizes)), sizes))
        request = self._here(requests)
        own = self.values[request, self._here(targets)]
        below = self.values[request[owner], self._here(np.concatenate(rows))] < own[owner]
        counts = torch.zeros(len(sizes), dtype=torch.long, device=self.values.device)
        ranks: Rows = sizes - counts.index_add_(0, owner, below.long()).cpu().numpy()
        return ranks

    def at(self, requests: Rows, columns: Rows) -> NDArray[np.floating]:
        """Return single scores."""
        found: NDArray[np.floating] = (
            self.values[self._here(requests), self._here(columns)].cpu().numpy()
        )
        return found

    def _here(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.values.device)

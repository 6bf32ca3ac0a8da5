"""Batches of a CTR model from rows of exposures.

Legend: R pages, N candidates, T history, Q query terms, F features.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from karma_ray.data.prepared import terms
from karma_ray.data.steps import flattened, list_sizes, places
from karma_ray.ranking.batch import CtrBatch
from karma_ray.ranking.config import RankingConfig

MEMO = 1 << 18
"""Queries whose hashed words are remembered."""


@dataclass
class CtrCollator:
    """(rows of exposures, keys) -> CtrBatch. The keys of random draws are not used."""

    config: RankingConfig
    num_features: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)
    """Further columns of row numbers, by the name in `CtrBatch.extra` (families.Family)."""
    _words: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def __call__(self, rows: pa.Table, keys: np.ndarray | None = None) -> CtrBatch:
        """Collate pages."""
        candidates, limit = rows.column("candidate_rows"), self.config.max_history
        sizes = list_sizes(candidates)
        features = np.zeros((int(sizes.sum()), 0), np.float32)
        if self.num_features:
            values = flattened(rows.column("features")).to_numpy()
            features = values.reshape(-1, self.num_features)
        clicked = flattened(rows.column("clicked")).to_numpy(zero_copy_only=False)
        return CtrBatch(
            history=torch.from_numpy(newest_last(rows.column("history_rows"), limit)),
            query=self.queries(rows.column("query").to_pylist()),
            request=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
            candidate=torch.from_numpy(flattened(candidates).to_numpy().astype(np.int64)),
            features=torch.from_numpy(features.copy()),
            clicked=torch.from_numpy(clicked.astype(np.float32)),
            extra={
                name: torch.from_numpy(newest_last(rows.column(column), None))
                for name, column in self.columns.items()
            },
        )

    def queries(self, queries: list[str | None]) -> Tensor:
        """Hash the words of queries.  # -> [R, Q]"""
        found = [self._hashed(query) for query in queries]
        padded = np.zeros((len(found), max(1, max(map(len, found), default=1))), np.int64)
        for row, words in enumerate(found):
            padded[row, : len(words)] = words
        return torch.from_numpy(padded)

    def _hashed(self, query: str | None) -> list[int]:
        if not query:
            return []
        if query not in self._words:
            if len(self._words) >= MEMO:
                self._words.clear()
            words = sorted(terms(query))[: self.config.max_query_terms]
            buckets = self.config.query_buckets
            self._words[query] = [1 + zlib.crc32(word.encode()) % buckets for word in words]
        return self._words[query]


def newest_last(column: pa.ChunkedArray, limit: int | None) -> np.ndarray:
    """Return lists of row numbers as [R, T] int64, the last `limit` of each; -1 in front."""
    sizes, values = list_sizes(column), flattened(column).to_numpy().astype(np.int64)
    width = max(1, int(sizes.max(initial=0)))
    width = width if limit is None else min(width, limit)
    padded = np.full((len(sizes), width), -1, np.int64)
    row = np.repeat(np.arange(len(sizes)), sizes)
    place = width - sizes[row] + places(sizes)
    padded[row[place >= 0], place[place >= 0]] = values[place >= 0]
    return padded

"""Engines of search: faiss' indexes behind the same call as the exact one, shards, and files.

Legend: I items, B queries, D width, K results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from karma_ray.retrieval.exact import ExactSearch
from karma_ray.retrieval.kinds import Flat, IndexKind, faiss_for

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]
    Rows = NDArray[np.int64]
    Mask = NDArray[np.bool_]

SMALL_SEARCH = 2_000_000
"""Number of inner products below which one thread is faster than starting several."""
FEW_ALLOWED = 0.1
"""Share of the items up to which a filtered search looks at all allowed ones."""
FILE = "index.faiss"


class Engine(Protocol):
    """What finds the best rows; an exact search finds them in the order of score, then row."""

    @property
    def d(self) -> int:
        """Width D."""

    def on(self, device: torch.device) -> Engine:
        """Return the engine with its exact search on a device; others stay on the CPU."""

    def tuned(self, kind: IndexKind) -> Engine:
        """Return the engine with other knobs of the search; an exact one has none."""

    def search(
        self, queries: Vectors, k: int, allowed: Mask | None = None
    ) -> tuple[Vectors, Rows]:  # [B, D], [I] -> [B, K]
        """Return scores and rows of the `k` best among the allowed items; row -1 where none is."""

    def write(self, folder: Path, stem: str = "") -> None:
        """Write files, whose names begin with `stem`."""


@dataclass(frozen=True)
class FaissSearch:
    """A faiss index of one kind."""

    index: Any
    kind: IndexKind

    @property
    def d(self) -> int:
        """Width D."""
        return int(self.index.d)

    def on(self, device: torch.device) -> FaissSearch:
        """Return this engine: approximate search stays on the CPU."""
        return self

    def tuned(self, kind: IndexKind) -> FaissSearch:
        """Return an engine over the same index with other knobs of the search."""
        return FaissSearch(self.index, kind)

    def search(
        self, queries: Vectors, k: int, allowed: Mask | None = None
    ) -> tuple[Vectors, Rows]:  # [B, D], [I] -> [B, K]
        """Return scores and rows of the best. With `allowed` there are k if k are allowed."""
        threads = self._faiss.omp_get_max_threads()
        alone = threads > 1 and len(queries) * self.index.ntotal < SMALL_SEARCH
        if alone:
            self._faiss.omp_set_num_threads(1)
        try:
            if allowed is None:
                return self._search(queries, k, self._usual)
            return self._filtered(queries, k, allowed)
        finally:
            if alone:
                self._faiss.omp_set_num_threads(threads)

    def _filtered(self, queries: Vectors, k: int, allowed: Mask) -> tuple[Vectors, Rows]:
        selector = self._faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        count = max(1, int(allowed.sum()))
        if count <= FEW_ALLOWED * len(allowed):
            return self._search_all(queries, k, selector)
        scores, rows = self._search(queries, k, self._parameters(selector, len(allowed) / count))
        dry = (rows[:, : min(k, count)] < 0).any(1)
        if dry.any():
            scores[dry], rows[dry] = self._search_all(queries[dry], k, selector)
        return scores, rows

    def _search(self, queries: Vectors, k: int, parameters: Any) -> tuple[Vectors, Rows]:
        return _none_last(*self.index.search(queries, k, params=parameters))

    @cached_property
    def _faiss(self) -> Any:
        return faiss_for(self.kind.kind)

    @cached_property
    def _usual(self) -> Any:
        return self._parameters(None, 1.0)

    def _parameters(self, selector: Any, effort: float) -> Any:
        assert not isinstance(self.kind, Flat)
        return self.kind.search_parameters(selector, effort)

    def _search_all(self, queries: Vectors, k: int, selector: Any) -> tuple[Vectors, Rows]:
        """Search among all items that the selector allows, whatever the knobs say."""
        if self.kind.kind != "hnsw":
            return self._search(queries, k, self._parameters(selector, 2.0**30))
        vectors = self._faiss.downcast_index(self.index.storage)
        parameters = self._faiss.SearchParameters(sel=selector)
        return _none_last(*vectors.search(queries, k, params=parameters))

    def write(self, folder: Path, stem: str = "") -> None:
        """Write faiss' file."""
        faiss_for(self.kind.kind).write_index(self.index, str(folder / f"{stem}{FILE}"))


@dataclass(frozen=True)
class Shards:
    """Engines over consecutive ranges of rows, searched one after another and merged."""

    parts: Sequence[Engine]
    starts: Sequence[int]
    """The first row of each part, and the number of rows."""

    @property
    def d(self) -> int:
        """Width D."""
        return self.parts[0].d

    def on(self, device: torch.device) -> Shards:
        """Return the shards with their exact searches on a device."""
        return Shards([part.on(device) for part in self.parts], self.starts)

    def tuned(self, kind: IndexKind) -> Shards:
        """Return the shards with other knobs of the search."""
        return Shards([part.tuned(kind) for part in self.parts], self.starts)

    def search(
        self, queries: Vectors, k: int, allowed: Mask | None = None
    ) -> tuple[Vectors, Rows]:  # [B, D], [I] -> [B, K]
        """Return scores and rows of the best of all parts, best first, equal ones by row."""
        scores, rows = [], []
        for part, (start, stop) in zip(self.parts, pairwise(self.starts), strict=True):
            mask = None if allowed is None else allowed[start:stop]
            found = part.search(queries, min(k, stop - start), mask)
            scores.append(found[0])
            rows.append(np.where(found[1] < 0, -1, found[1] + start))
        all_scores, all_rows = np.concatenate(scores, 1), np.concatenate(rows, 1)
        order = np.lexsort((all_rows, -all_scores))[:, :k]
        return np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_rows, order, 1)

    def write(self, folder: Path, stem: str = "") -> None:
        """Write the files of every part."""
        for number, part in enumerate(self.parts):
            part.write(folder, f"{stem}{_stem(number, len(self.parts))}")


def build_engine(vectors: Vectors, kind: IndexKind, num_shards: int = 1) -> Engine:  # [I, D]
    """Build an engine of one kind, in shards of the same size if there are several."""
    starts = shard_starts(len(vectors), num_shards)
    parts: list[Engine] = []
    for start, stop in pairwise(starts):
        built = kind.build(vectors[start:stop])
        parts.append(built if isinstance(kind, Flat) else FaissSearch(built, kind))
    return parts[0] if num_shards == 1 else Shards(parts, starts)


def read_engine(folder: Path, kind: IndexKind, count: int, num_shards: int = 1) -> Engine:
    """Map an engine into memory; raises ValueError when a file is missing or damaged."""
    parts = [_read(folder, kind, _stem(part, num_shards)) for part in range(num_shards)]
    return parts[0] if num_shards == 1 else Shards(parts, shard_starts(count, num_shards))


def shard_starts(count: int, num_shards: int) -> list[int]:
    """Return the first row of each shard, and the number of rows."""
    return [count * shard // num_shards for shard in range(num_shards + 1)]


def _stem(number: int, num_shards: int) -> str:
    return "" if num_shards == 1 else f"shard-{number:05}."


def _read(folder: Path, kind: IndexKind, stem: str) -> Engine:
    if isinstance(kind, Flat):
        return ExactSearch.read(folder, stem)
    faiss = faiss_for(kind.kind)
    path = folder / f"{stem}{FILE}"
    mapped = getattr(faiss, "IO_FLAG_MMAP_IFC", 0)  # faiss before 1.11 reads a copy
    try:
        return FaissSearch(faiss.read_index(str(path), mapped), kind)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(reason) from None


def _none_last(scores: Vectors, rows: Rows) -> tuple[Vectors, Rows]:
    """Score -inf where faiss found nothing, for which it has a number of its own."""
    if rows[:, -1].min() < 0:
        scores[rows < 0] = -np.inf
    return scores, rows

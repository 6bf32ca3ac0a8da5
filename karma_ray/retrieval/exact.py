"""Exact search by a matrix product over vectors that are mapped into memory.

Only PyTorch is needed. Every candidate's score is computed again in float64 before it is rounded,
so that it depends neither on the shape of the product nor on the device: items with equal scores
are in the order of their rows, and parts of a catalogue give the scores of the whole.

Legend: I items, B queries, D width, K results.
"""

from __future__ import annotations

import struct
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Vectors = NDArray[np.float32]
    Rows = NDArray[np.int64]
    Mask = NDArray[np.bool_]

SCORES_AT_ONCE = 32_000_000
"""Scores in memory at once on a CPU: 128 MB, for any number of queries."""
SLACK = 16
"""Candidates beyond K whose scores are computed again, as rounding may have misplaced them."""
SAMPLE_STEP = 16
"""Of so many scores one is looked at to guess the lowest of the best."""
FILE = "vectors.npy"
# Name; width, items, two unused numbers, trained, inner product, number of floats (IndexFlatIP).
_HEADER = struct.Struct("<4siqqq?iQ")
_NAME = b"IxFI"


class ExactSearch:
    """Search over all inner products with `vectors` [I, D], on the CPU unless told otherwise."""

    def __init__(self, vectors: Vectors, device: torch.device | str = "cpu") -> None:
        self.vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self.device = torch.device(device)

    @cached_property
    def tensor(self) -> Tensor:  # [I, D]
        """The vectors on the device; on a CPU these are the same memory."""
        return torch.from_numpy(self.vectors).to(self.device)

    @cached_property
    def _rounding(self) -> float:
        """What a float32 score may be wrong by, for a query of length 1."""
        longest = float(torch.linalg.vector_norm(self.tensor, dim=1).max())
        return float(4 * self.d**0.5 * 2.0**-24 * longest)

    @property
    def d(self) -> int:
        """Width D, by faiss' name for it."""
        return int(self.vectors.shape[1])

    def on(self, device: torch.device) -> ExactSearch:
        """Return this search on a device."""
        return self if device == self.device else ExactSearch(self.vectors, device)

    def tuned(self, kind: object) -> ExactSearch:
        """Return this search, which has no knobs."""
        return self

    def search(
        self, queries: Vectors, k: int, allowed: Mask | None = None
    ) -> tuple[Vectors, Rows]:  # [B, D], [I] -> [B, K]
        """Return scores and rows of the `k` best items per query, best first, then by row.

        With `allowed` only these items count; if they are fewer than k, the rest has row -1 and
        score -inf.
        """
        step = max(1, self._scores_at_once() // len(self.vectors))
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), int)
        barred = None if allowed is None else torch.from_numpy(~allowed).to(self.device)
        with torch.inference_mode():
            for start in range(0, len(queries), step):
                some = slice(start, start + step)
                found = self._scores(queries[some])
                if barred is not None:
                    found.masked_fill_(barred, -torch.inf)
                scores[some], rows[some] = self._best(queries[some], found, k)
        return scores, rows

    def _scores(self, queries: Vectors) -> Tensor:  # [B, D] -> [B, I]
        if self.device.type == "cpu":
            # Of one query, NumPy's product took a third of the time of PyTorch's on 10^5 items.
            return torch.from_numpy(queries @ self.vectors.T)
        return torch.from_numpy(queries).to(self.device) @ self.tensor.T

    def _best(self, queries: Vectors, found: Tensor, k: int) -> tuple[Vectors, Rows]:
        """Return the best of rounded scores [B, I]; takes more candidates where k are too close."""
        count, take = found.shape[1], k + SLACK
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), int)
        left = np.arange(len(queries))
        lengths = np.linalg.norm(queries, axis=1)
        while len(left):
            take = min(take, count)
            part = found if len(left) == len(queries) else found[left]
            values, places = _top(part, take)
            places[values == -np.inf] = -1
            scores[left], rows[left] = rescored(self.vectors, queries[left], places, k)
            if take == count:
                break
            # An item that was not taken may belong among the k best only if it scores as high.
            close = values[:, -1] >= scores[left, -1] - self._rounding * lengths[left]
            left = left[close & (values[:, -1] > -np.inf)]
            take *= 4
        return scores, rows

    def _scores_at_once(self) -> int:
        """Return how many scores are made at once; on a GPU they fill an eighth of what is free."""
        if self.device.type != "cuda":
            return SCORES_AT_ONCE
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(SCORES_AT_ONCE, free // 8 // 4)

    def write(self, folder: Path, stem: str = "") -> None:
        """Write the vectors as a file that can be mapped, which faiss' own cannot be: its header
        of 45 bytes shifts every number, and products of such memory take up to four times as long.
        """
        np.save(folder / f"{stem}{FILE}", self.vectors)

    @classmethod
    def read(cls, folder: Path, stem: str = "") -> ExactSearch:
        """Map the vectors of `write` into memory; raises ValueError if they are damaged.

        A folder of earlier versions has faiss' file instead, which is read.
        """
        path, faiss_file = folder / f"{stem}{FILE}", folder / "index.faiss"
        if not path.exists() and faiss_file.exists():
            return cls(_of_faiss(faiss_file.read_bytes()))
        try:
            # Pages are shared between processes as long as nobody writes, and torch sees memory
            # that it may write to.
            mapped = np.asarray(np.load(path, mmap_mode="c"))
        except (OSError, EOFError) as error:
            raise ValueError(str(error)) from None
        if mapped.ndim != 2 or mapped.dtype != np.float32:
            raise ValueError(f"holds {mapped.dtype} of {mapped.ndim} dimensions")
        return cls(mapped)


def _top(scores: Tensor, take: int) -> tuple[Vectors, Rows]:  # [B, I] -> [B, take]
    """Return the highest scores and their rows, highest first, as `torch.topk` does.

    On a CPU a sample says what the lowest of them is likely to be, and only what is as high is
    sorted, which takes a quarter of the time.
    """
    count = scores.shape[1]
    if scores.device.type != "cpu" or count < 4 * SAMPLE_STEP * take:
        values, rows = torch.topk(scores, take)
        return values.cpu().numpy(), rows.cpu().numpy()
    found = np.empty((len(scores), take), np.float32), np.empty((len(scores), take), np.int64)
    rank = 2 * take // SAMPLE_STEP + SAMPLE_STEP
    for number, row in enumerate(scores.numpy()):
        likely = np.partition(row[::SAMPLE_STEP], -rank)[-rank]
        places = np.flatnonzero(row >= likely)
        if len(places) < take:
            places = np.argpartition(row, -take)[-take:]
        high = row[places]
        order = np.argsort(-high)[:take]
        found[0][number], found[1][number] = high[order], places[order]
    return found


def rescored(
    vectors: Vectors, queries: Vectors, rows: Rows, k: int
) -> tuple[Vectors, Rows]:  # [I, D], [B, D], [B, N] -> [B, K]
    """Score candidate rows again in float64; returns the `k` best, equal ones by row.

    Row -1 means none and comes last with score -inf.
    """
    best = np.empty((len(rows), k), np.float32), np.empty((len(rows), k), np.int64)
    for number, (query, places) in enumerate(zip(queries.astype(np.float64), rows, strict=True)):
        scores = (vectors.take(places, 0).astype(np.float64) @ query).astype(np.float32)
        scores[places < 0] = -np.inf
        order = np.lexsort((places, -scores))[:k]
        best[0][number], best[1][number] = scores[order], places[order]
    return best


def _of_faiss(data: bytes) -> Vectors:  # [I, D]
    """Read the bytes that faiss writes for an `IndexFlatIP`; raises ValueError on others."""
    if len(data) < _HEADER.size:
        raise ValueError(f"{len(data)} bytes are too few for an index")
    name, width, count, _, _, _, _, size = _HEADER.unpack_from(data)
    if name != _NAME or size != width * count or len(data) != _HEADER.size + 4 * size:
        raise ValueError("is not an exact index, or is incomplete")
    # A copy, since these bytes are read-only and torch needs writable memory.
    return np.frombuffer(data, np.float32, offset=_HEADER.size).reshape(count, width).copy()

"""Exact search by a matrix product, stored in the file format of faiss' exact index.

Only PyTorch is needed, and faiss can read the file too.

Legend: I items, B queries, D width, K results.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]
    Rows = NDArray[np.int64]

SCORES_AT_ONCE = 32_000_000
"""Scores in memory at once: 128 MB, for any number of queries."""
# Name; width, items, two unused numbers, trained, inner product, number of floats (IndexFlatIP).
_HEADER = struct.Struct("<4siqqq?iQ")
_NAME, _UNUSED = b"IxFI", 1 << 20


class ExactSearch:
    """Search over all inner products with `vectors` [I, D]."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self._matrix = torch.from_numpy(self.vectors).T

    @property
    def d(self) -> int:
        """Width D, by faiss' name for it."""
        return int(self.vectors.shape[1])

    def search(self, queries: Vectors, k: int) -> tuple[Vectors, Rows]:  # [B, D] -> [B, K]
        """Return scores and rows of the `k` best items per query, best first."""
        scores = np.empty((len(queries), k), np.float32)
        rows = np.empty((len(queries), k), np.int64)
        step = max(1, SCORES_AT_ONCE // len(self.vectors))
        with torch.inference_mode():
            for start in range(0, len(queries), step):
                some = slice(start, start + step)
                best = torch.topk(torch.from_numpy(queries[some]) @ self._matrix, k)
                scores[some], rows[some] = best.values.numpy(), best.indices.numpy()
        return scores, rows

    def to_bytes(self) -> bytes:
        """Return the bytes that faiss writes for an `IndexFlatIP`."""
        count, width = self.vectors.shape
        numbers = (width, count, _UNUSED, _UNUSED, True, 0, self.vectors.size)
        return _HEADER.pack(_NAME, *numbers) + self.vectors.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> ExactSearch:
        """Read the bytes of `to_bytes` or faiss; raises ValueError on anything else."""
        if len(data) < _HEADER.size:
            raise ValueError(f"{len(data)} bytes are too few for an index")
        name, width, count, _, _, _, _, size = _HEADER.unpack_from(data)
        if name != _NAME or size != width * count or len(data) != _HEADER.size + 4 * size:
            raise ValueError("is not an exact index, or is incomplete")
        # A copy, since these bytes are read-only and torch needs writable memory.
        return cls(
            np.frombuffer(data, np.float32, offset=_HEADER.size).reshape(count, width).copy()
        )

"""Exact search by a matrix product, stored in the file format of faiss' exact index.

Only PyTorch is needed, and faiss can read the file too.

Legend: I items, B queries, D width, K results.
"""

from __future__ import annotations

import struct
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Vectors = NDArray[np.float32]
    Rows = NDArray[np.int64]

SCORES_AT_ONCE = 32_000_000
"""Scores in memory at once on a CPU: 128 MB, for any number of queries."""
# Name; width, items, two unused numbers, trained, inner product, number of floats (IndexFlatIP).
_HEADER = struct.Struct("<4siqqq?iQ")
_NAME, _UNUSED = b"IxFI", 1 << 20


class ExactSearch:
    """Search over all inner products with `vectors` [I, D], on the CPU unless told otherwise."""

    def __init__(self, vectors: Vectors, device: torch.device | str = "cpu") -> None:
        self.vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self.device = torch.device(device)

    @cached_property
    def _matrix(self) -> Tensor:  # [D, I]
        return torch.from_numpy(self.vectors).to(self.device).T

    @property
    def d(self) -> int:
        """Width D, by faiss' name for it."""
        return int(self.vectors.shape[1])

    def search(self, queries: Vectors, k: int) -> tuple[Vectors, Rows]:  # [B, D] -> [B, K]
        """Return scores and rows of the `k` best items per query, best first."""
        step = max(1, self._scores_at_once() // len(self.vectors))
        with torch.inference_mode():
            scores = torch.empty((len(queries), k), device=self.device)
            rows = torch.empty((len(queries), k), dtype=torch.long, device=self.device)
            wanted = torch.from_numpy(queries).to(self.device)
            for start in range(0, len(queries), step):
                some = slice(start, start + step)
                scores[some], rows[some] = torch.topk(wanted[some] @ self._matrix, k)
        return scores.cpu().numpy(), rows.cpu().numpy()

    def _scores_at_once(self) -> int:
        """Return how many scores are made at once; on a GPU they fill an eighth of what is free."""
        if self.device.type != "cuda":
            return SCORES_AT_ONCE
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(SCORES_AT_ONCE, free // 8 // 4)

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

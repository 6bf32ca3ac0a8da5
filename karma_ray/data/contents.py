"""Content ids: numbers that are equal for items whose normalised texts are equal.

The texts are compared by digests of 128 bits, so that neither a dictionary of texts nor the texts
themselves are held; two of 10^9 different texts have the same digest with probability 10^-21.

Legend: I items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

FORMAT = 1
"""Raised when other texts count as equal, so that old files are ignored."""


def fill_content_ids(numbers: np.ndarray, parts: Iterable[Sequence[str]]) -> None:
    """Number I texts, which come in parts, by first appearance in `numbers` [I].

    Case and amounts of space do not count.
    """
    digests = np.empty((len(numbers), 2), np.uint64)
    start = 0
    for texts in parts:
        joined = b"".join(map(_digest, texts))
        digests[start : start + len(texts)] = np.frombuffer(joined, "<u8").reshape(-1, 2)
        start += len(texts)
    order = np.lexsort(digests.T)  # stable: the first of equal ones comes first
    ordered = digests[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    firsts = order[new]
    rank = np.empty(len(firsts), np.int64)
    rank[np.argsort(firsts)] = np.arange(len(firsts))
    numbers[order] = rank[np.cumsum(new) - 1]


def _digest(text: str) -> bytes:
    normal = " ".join(text.lower().split())
    return hashlib.blake2b(normal.encode(), digest_size=16).digest()

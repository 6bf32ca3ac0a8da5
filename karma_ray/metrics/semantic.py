"""JS@K: the overlap between the words of retrieved items and of the target (method 1.13).

Legend: I items, V distinct terms, b requests, K retrieved items each.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

JsMode = Literal["per_item", "pooled"]

# Words, and numbers with their decimal point; punctuation is dropped.
_WORD = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+")
_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")


def terms(text: str) -> list[str]:
    """Return the terms of a text in order: lowercase, Chinese segmented by jieba, no punctuation.

    No stop words are removed (method 1.13).
    """
    lowered = text.lower()
    if not _CHINESE.search(lowered):
        return _WORD.findall(lowered)
    import jieba  # loaded only for catalogues with Chinese titles

    jieba.setLogLevel(logging.WARNING)
    return [term for term in jieba.lcut(lowered) if _WORD.search(term)]


@dataclass(frozen=True)
class TermMatrix:
    """The term set T(i) of every item, as a sparse 0/1 matrix."""

    matrix: sp.csr_matrix  # [I, V]
    sizes: NDArray[np.int64]  # [I]

    @classmethod
    def from_titles(cls, titles: Iterable[str]) -> TermMatrix:
        """Build the term sets of the catalogue's titles, in catalogue order."""
        vocabulary: dict[str, int] = {}
        columns, ends = array("q"), array("q", [0])
        for title in titles:
            columns.extend(
                vocabulary.setdefault(term, len(vocabulary)) for term in set(terms(title))
            )
            ends.append(len(columns))
        shape = (len(ends) - 1, max(len(vocabulary), 1))
        ones = np.ones(len(columns), dtype=np.int32)
        matrix = sp.csr_matrix((ones, np.array(columns), np.array(ends)), shape=shape)
        return cls(matrix, np.asarray(np.diff(ends), dtype=np.int64))

    def jaccard(
        self, truths: NDArray[np.int64], retrieved: NDArray[np.int64], mode: JsMode = "per_item"
    ) -> NDArray[np.float64]:  # [b], [b, K] -> [b]
        """Return JS@K per request, in [0, 1].

        `per_item`: mean over r of |T(i) & T(r)| / |T(i) | T(r)|; `pooled`: Jaccard of T(i) and the
        union of the K term sets. An unknown target (-1), an empty list and a pair without any
        term give 0.
        """
        values = np.zeros(len(truths))
        known = truths >= 0
        if retrieved.shape[1] == 0 or not known.any():
            return values
        compare = self._per_item if mode == "per_item" else self._pooled
        values[known] = compare(truths[known], retrieved[known])
        return values

    def _per_item(
        self, truths: NDArray[np.int64], retrieved: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        repeated, flat = np.repeat(truths, retrieved.shape[1]), retrieved.ravel()
        shared = _row_sums(self.matrix[repeated].multiply(self.matrix[flat]))
        union = self.sizes[repeated] + self.sizes[flat] - shared
        ratios: NDArray[np.float64] = (shared / np.maximum(union, 1)).reshape(retrieved.shape)
        return np.asarray(ratios.mean(axis=1))

    def _pooled(
        self, truths: NDArray[np.int64], retrieved: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        ends = np.arange(len(truths) + 1) * retrieved.shape[1]
        chosen = sp.csr_matrix(
            (np.ones(retrieved.size, dtype=np.int32), retrieved.ravel(), ends),
            shape=(len(truths), self.matrix.shape[0]),
        )
        pool = (chosen @ self.matrix).sign()
        shared = _row_sums(pool.multiply(self.matrix[truths]))
        union = _row_sums(pool) + self.sizes[truths] - shared
        return np.asarray(shared / np.maximum(union, 1))


def without_truth(
    truths: NDArray[np.int64], retrieved: NDArray[np.int64]
) -> NDArray[np.int64]:  # [b], [b, K + 1] -> [b, K]
    """Return the K best items without the target, from the K + 1 best (JS@50_excl_gt)."""
    is_truth = retrieved == truths[:, None]
    truth_last = np.argsort(is_truth, axis=1, kind="stable")
    return np.take_along_axis(retrieved, truth_last, axis=1)[:, :-1]


def _row_sums(matrix: sp.spmatrix) -> NDArray[np.int64]:
    return np.asarray(matrix.sum(axis=1), dtype=np.int64).ravel()

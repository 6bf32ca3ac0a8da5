"""The channel of words: BM25 by an inverted index whose impacts are computed beforehand.

It gives the scores of `baselines/bm25.py` without that ranker's catalogue and vectorizer.

Legend: I items, V terms, n occurrences, T terms of a request.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from karma_ray.baselines.impacts import impacts
from karma_ray.metrics.semantic import terms

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    Rows = NDArray[np.int64]
    Scores = NDArray[np.float32]

FEW_TERMS = 4
"""Up to so many terms, a product takes longer to set up than their lists to add."""


@dataclass(frozen=True)
class Words:
    """Which items have a term, and which terms an item has."""

    numbers: Mapping[str, int]
    """term -> its number."""
    ends: NDArray[np.int64]  # [V + 1]
    items: NDArray[np.int32]  # [n] rows of the items with each term
    impact: NDArray[np.float32]  # [n]
    text_ends: NDArray[np.int64]  # [I + 1]
    text_terms: NDArray[np.int32]  # [n] terms of each item
    text_shares: NDArray[np.float32]  # [n] of the item's words

    @classmethod
    def of(cls, texts: Iterable[str]) -> Words:
        """Read the texts of all items, in the order of the index."""
        numbers: dict[str, int] = {}
        found, times, ends = array("i"), array("f"), array("q", [0])
        for text in texts:
            for term, count in Counter(terms(text)).items():
                found.append(numbers.setdefault(term, len(numbers)))
                times.append(count)
            ends.append(len(found))
        shape = (len(ends) - 1, max(len(numbers), 1))
        columns = np.array(found, np.int32), np.array(ends, np.int64)
        counts = sp.csr_matrix((np.array(times, np.float32), *columns), shape=shape)
        by_term = impacts(counts).T.tocsr()
        lengths = np.repeat(np.asarray(counts.sum(axis=1)).ravel(), np.diff(columns[1]))
        return cls(
            numbers, by_term.indptr.astype(np.int64), by_term.indices.astype(np.int32),
            by_term.data.astype(np.float32), columns[1], columns[0],
            (counts.data / np.maximum(lengths, 1.0)).astype(np.float32),
        )  # fmt: skip

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.text_ends) - 1

    def of_query(self, query: str | None) -> tuple[Rows, Scores]:
        """Return the known terms [T] of a query, and the share of each."""
        known = [self.numbers[term] for term in terms(query or "") if term in self.numbers]
        found, counts = np.unique(np.array(known, np.int64), return_counts=True)
        return found, (counts / max(len(known), 1)).astype(np.float32)

    def of_history(self, rows: Rows) -> tuple[Rows, Scores]:
        """Return the terms [T] of the items of a history, and their mean shares."""
        if not len(rows):
            return np.empty(0, np.int64), np.empty(0, np.float32)
        spans = [slice(self.text_ends[row], self.text_ends[row + 1]) for row in rows]
        numbers = np.concatenate([self.text_terms[span] for span in spans])
        shares = np.concatenate([self.text_shares[span] for span in spans]) / len(rows)
        found, place = np.unique(numbers, return_inverse=True)
        return found, np.bincount(place, shares, len(found)).astype(np.float32)

    def scores(self, asked: tuple[Rows, Scores]) -> Scores:  # [T], [T] -> [I]
        """Return the sum of the impacts of terms, each times its share; ascending terms."""
        numbers, shares = asked
        if len(numbers) > FEW_TERMS:
            return self._product(numbers[::-1], shares[::-1])
        found = np.zeros(self.num_items, np.float32)
        for number, share in zip(numbers, shares, strict=True):
            span = slice(self.ends[number], self.ends[number + 1])
            found[self.items[span]] += self.impact[span] * share
        return found

    def _product(self, numbers: Rows, shares: Scores) -> Scores:  # [T], [T] -> [I]
        """Return the same for descending terms by one sparse product, which copies no list.

        A column reaches from one end to the next, so every other column is what lies between two
        lists. In descending order that has a negative length, and SciPy skips it; it only refuses
        to make such a matrix, so the arrays are given to one that is empty.
        """
        spans = np.column_stack([self.ends[numbers], self.ends[numbers + 1]]).reshape(-1)
        weights = np.column_stack([shares, np.zeros_like(shares)]).reshape(-1)[:-1]
        lists = sp.csc_array((self.num_items, len(weights)), dtype=np.float32)
        lists.data, lists.indices = self.impact, self.items
        lists.indptr = spans.astype(sp.get_index_dtype(maxval=len(self.items)))
        total: Scores = lists @ weights
        return total

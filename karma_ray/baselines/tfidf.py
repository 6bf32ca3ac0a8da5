"""A floor: TF-IDF of item texts for the words of the query and the history's items."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

from karma_ray.baselines.histories import history_counts
from karma_ray.data.catalog import Catalog
from karma_ray.metrics.semantic import terms

_BLOCK = 64


class TfidfRanker:
    """score = (tfidf(query) + mean over the history of tfidf(item)) . tfidf(candidate).

    Every text is a unit vector, so query and history have the same weight; terms are as in JS@50.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._vectorizer = TfidfVectorizer(analyzer=terms, sublinear_tf=True, dtype=np.float32)
        self._items = self._vectorizer.fit_transform(catalog.each_text()).tocsr()  # [I, V]
        self._by_term = self._items.T.tocsr()  # [V, I]

    def score(self, examples: pa.Table) -> NDArray[np.float32]:  # -> [b, I]
        """Return scores like cosines; a request without query and history scores 0."""
        vectors = self._requests(examples)  # [b, V]
        scores = np.zeros((examples.num_rows, self._catalog.num_items), dtype=np.float32)
        for start in range(0, examples.num_rows, _BLOCK):
            product = vectors[start : start + _BLOCK] @ self._by_term
            product.toarray(out=scores[start : start + _BLOCK])
        return scores

    def _requests(self, examples: pa.Table) -> sp.csr_matrix:
        queries = self._vectorizer.transform(q or "" for q in examples.column("query").to_pylist())
        counts = history_counts(examples, self._catalog)  # [b, I]
        steps = np.asarray(counts.sum(axis=1)).ravel()
        mean = sp.diags(1.0 / np.maximum(steps, 1.0)) @ counts
        return (queries + mean @ self._items).tocsr().astype(np.float32)

"""A floor: Okapi BM25 of item texts for the words of the query and of the history's items."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize

from karma_ray.baselines.histories import history_counts
from karma_ray.baselines.impacts import impacts
from karma_ray.data.catalog import Catalog
from karma_ray.metrics.semantic import terms

_BLOCK = 64


class Bm25Ranker:
    """score = mean over the query's terms of w(t, item) + mean over the history of the same.

    w(t, d) = log(1 + (N - n_t + .5) / (n_t + .5)) f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|))
    (Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009); the 1 in the logarithm
    keeps frequent terms above 0. A history item searches with the terms of its text. The scores of
    every searching text are averaged over its terms, so query and history have the same weight,
    as in `tfidf`; a query alone ranks as with the usual sum.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._vectorizer = CountVectorizer(analyzer=terms, dtype=np.float32)
        counts = self._vectorizer.fit_transform(catalog.each_text()).tocsr()  # [I, V]
        self._texts = normalize(counts, norm="l1")  # [I, V] items as queries
        self._by_term = impacts(counts).T.tocsr()  # [V, I] items as documents

    def score(self, examples: pa.Table) -> NDArray[np.float32]:  # -> [b, I]
        """Return BM25 per search term; a request without query and history scores 0."""
        asked = self._requests(examples)  # [b, V]
        scores = np.zeros((examples.num_rows, self._catalog.num_items), dtype=np.float32)
        for start in range(0, examples.num_rows, _BLOCK):
            product = asked[start : start + _BLOCK] @ self._by_term
            product.toarray(out=scores[start : start + _BLOCK])
        return scores

    def _requests(self, examples: pa.Table) -> sp.csr_matrix:
        texts = [query or "" for query in examples.column("query").to_pylist()]
        queries = normalize(self._vectorizer.transform(texts), norm="l1")
        history = normalize(history_counts(examples, self._catalog), norm="l1")  # [b, I]
        return (queries + history @ self._texts).tocsr().astype(np.float32)

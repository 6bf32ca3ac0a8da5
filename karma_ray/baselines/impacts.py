"""What one occurrence of a term in an item adds to BM25, for every term and item."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

K1, B = 1.2, 0.75


def impacts(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Convert term counts [I, V] to w(t, d) [I, V] of `Bm25Ranker`, with the same sparsity."""
    lengths = np.asarray(counts.sum(axis=1)).ravel()
    found = np.bincount(counts.indices, minlength=counts.shape[1])
    rarity = np.log1p((len(lengths) - found + 0.5) / (found + 0.5))
    norm = K1 * (1.0 - B + B * lengths / max(lengths.mean(), 1e-9))  # [I]
    rows = np.repeat(np.arange(len(lengths)), np.diff(counts.indptr))
    values = rarity[counts.indices] * counts.data * (K1 + 1.0) / (counts.data + norm[rows])
    weights = sp.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)
    return weights.astype(np.float32)

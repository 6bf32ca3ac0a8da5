"""Histories of several requests as a sparse matrix."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from karma_ray.data.catalog import Catalog


def history_counts(examples: pa.Table, catalog: Catalog) -> sp.csr_matrix:  # -> [b, I]
    """Count each catalogue item in each request's history; unknown ids are skipped."""
    rows = [catalog.rows(ids or []) for ids in examples.column("history_item_ids").to_pylist()]
    known = [row[row >= 0] for row in rows]
    ends = np.cumsum([0, *(len(row) for row in known)])
    columns = np.concatenate([*known, np.zeros(0, dtype=np.int64)])
    ones = np.ones(len(columns), dtype=np.float32)
    return sp.csr_matrix((ones, columns, ends), shape=(len(known), catalog.num_items))

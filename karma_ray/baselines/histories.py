"""Histories of several requests as a sparse matrix."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from karma_ray.data.catalog import Catalog
from karma_ray.data.steps import catalog_rows, flattened, list_sizes


def history_counts(examples: pa.Table, catalog: Catalog) -> sp.csr_matrix:  # -> [b, I]
    """Count each catalogue item in each request's history; unknown ids are skipped."""
    column = examples.column("history_item_ids")
    sizes = list_sizes(column)
    rows = catalog_rows(catalog, flattened(column))
    known = rows >= 0
    counts = np.bincount(np.repeat(np.arange(len(sizes)), sizes)[known], minlength=len(sizes))
    ends = np.concatenate([[0], np.cumsum(counts)])
    ones = np.ones(int(known.sum()), dtype=np.float32)
    return sp.csr_matrix((ones, rows[known], ends), shape=(len(sizes), catalog.num_items))

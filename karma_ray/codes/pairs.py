"""Pairs of items that users click one after the other, filtered by relevance (QARM V2, 2602.08559).

The paper lets an LLM say by reasoning which pairs are related. Here relevance is a function of the
pairs, so that an LLM may take its place; the one that is built compares the items' texts.
Legend: P pairs, N clicks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from sklearn.feature_extraction.text import TfidfVectorizer

from karma_ray.data.catalog import Catalog
from karma_ray.data.steps import catalog_rows, flattened, list_sizes
from karma_ray.metrics.semantic import terms

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pairs = NDArray[np.int64]  # [P, 2]

COLUMNS = ("item_ids", "timestamps", "loss_mask")
"""The columns of training windows that pairs are made of."""
Relevance = Callable[["Pairs"], "NDArray[np.float32]"]
"""Pairs [P, 2] of catalogue rows -> how related each is [P]."""


def co_clicks(windows: Iterable[pa.Table], catalog: Catalog, gap_s: float) -> Pairs:
    """Return the distinct pairs of different items clicked in a row, the smaller row first.

    Two clicks are in a row if none of the user's lies between them and at most `gap_s` seconds do.
    Windows overlap, so a pair counts where its later click is trained on (`loss_mask`): pairs are
    of the training period alone.
    """
    found = [_of(rows, catalog, gap_s) for rows in windows]
    pairs = np.sort(np.concatenate([np.zeros((0, 2), np.int64), *found]), axis=1)
    return np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)


def text_similarity(catalog: Catalog) -> Relevance:
    """Return the cosine of the TF-IDF vectors of two items' texts, as a relevance."""
    made = TfidfVectorizer(analyzer=terms, sublinear_tf=True, dtype=np.float32)
    vectors = made.fit_transform(catalog.each_text()).tocsr()

    def similarity(pairs: Pairs) -> NDArray[np.float32]:
        product = vectors[pairs[:, 0]].multiply(vectors[pairs[:, 1]])
        return np.asarray(product.sum(axis=1), np.float32).ravel()

    return similarity


def relevant(pairs: Pairs, relevance: Relevance, least: float) -> Pairs:
    """Return the pairs that are related at least so much."""
    return pairs[relevance(pairs) >= least] if len(pairs) else pairs


def _of(rows: pa.Table, catalog: Catalog, gap_s: float) -> Pairs:
    """Return the pairs of some windows."""
    items = catalog_rows(catalog, flattened(rows.column("item_ids")))  # [N]
    window = np.repeat(np.arange(rows.num_rows), list_sizes(rows.column("item_ids")))
    times = np.asarray(flattened(rows.column("timestamps")).cast(pa.int64()))
    trained = np.asarray(flattened(rows.column("loss_mask")), bool)
    near = np.diff(times) <= gap_s * 1e6
    known = (items[:-1] >= 0) & (items[1:] >= 0)
    kept = (window[:-1] == window[1:]) & trained[1:] & near & known
    return np.stack([items[:-1][kept], items[1:][kept]], axis=1)

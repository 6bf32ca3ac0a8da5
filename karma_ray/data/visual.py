"""Frozen visual features of the catalogue (v in method 1.9): their table, and reading by row.

DATA/visual_features/ contains the encoder's output, one row per item with a readable image, and a
manifest with mean and standard deviation of each dimension. The features are standardised when a
node writes its local copy, which all its processes map into memory.

Legend: N rows, I items, N_v tokens of an image, d_v width of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from karma_ray.artifacts import (
    data_files,
    join,
    open_filesystem,
    read_manifest,
    write_manifest,
    write_table,
)
from karma_ray.data.catalog import Catalog
from karma_ray.data.memory_map import mapped_array
from karma_ray.errors import InputError

KIND = "visual_features"
"""Kind of the manifest, and name of the folder in a data folder."""
FORMAT = 1
"""Raised when a node's copy is computed differently, so that old files are ignored."""
TARGETS = {"pooled:1": 1, "grid:16": 4, "grid:64": 8}
"""`img_target` -> cells per side of the grid; N_v is its square."""
SMALLEST_DEVIATION = 1e-6
"""Smallest deviation that is divided by; a constant dimension is only centred."""


def features_uri(data_uri: str) -> str:
    """Return the folder of the visual features in a data folder."""
    return join(data_uri, KIND)


def grid_of(target: str) -> int:
    """Return the cells per side of `pooled:1`, `grid:16` or `grid:64`; raises InputError."""
    if target not in TARGETS:
        raise InputError("--target", target, choices=TARGETS)
    return TARGETS[target]


@dataclass(frozen=True)
class VisualFeatures:
    """Standardised features by catalogue row; `facts` is the manifest of their folder."""

    values: np.ndarray  # [I, N_v, d_v] float32, NaN where an item has no image
    facts: dict[str, Any]

    @classmethod
    def load(cls, uri: str, catalog: Catalog) -> VisualFeatures:
        """Load the features of `catalog` from the folder at `uri`, mapped from the node's copy.

        A catalogue that was built in memory has no copy on the node; its features are read into
        memory. Raises InputError when the folder is missing, unfinished or of another catalogue.
        """
        facts = read_manifest(uri, KIND)
        if catalog.copy is None:
            values = np.empty(_shape(catalog, facts), np.float32)
            _fill(values, uri, facts, catalog)
            return cls(values, facts)
        if facts["parents"].get("items") != catalog.copy.stem:
            raise _other_catalogue(uri)
        name = f"{catalog.copy.stem}-{facts['content_hash']}-{FORMAT}.visual.npy"
        values = mapped_array(
            catalog.copy.with_name(name), np.float32, _shape(catalog, facts),
            lambda values: _fill(values, uri, facts, catalog),
        )  # fmt: skip
        return cls(values, facts)

    @property
    def num_tokens(self) -> int:
        """Tokens per image, N_v."""
        return int(self.values.shape[1])

    @property
    def width(self) -> int:
        """Width of a token, d_v."""
        return int(self.values.shape[2])

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return features [N, N_v, d_v] of catalogue rows [N], and the mask [N] of images.

        Features are zero for items without an image, and for row -1 (an unknown item).
        """
        values = np.array(self.values[rows], np.float32)
        present = (rows >= 0) & ~np.isnan(values[:, 0, 0])
        values[~present] = 0.0
        return values, present


@dataclass
class Moments:
    """Count, sum and sum of squares of each dimension, which can be added over parts."""

    count: int
    total: np.ndarray  # [d_v] float64
    squares: np.ndarray  # [d_v] float64

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """Compute the moments of features [n, N_v, d_v], over all tokens."""
        flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
        return cls(len(flat), flat.sum(0), np.square(flat).sum(0))

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both parts together."""
        return Moments(
            self.count + other.count, self.total + other.total, self.squares + other.squares
        )

    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and deviation [d_v] float64; a constant dimension has deviation 1."""
        mean = self.total / max(1, self.count)
        variance = self.squares / max(1, self.count) - np.square(mean)
        std = np.sqrt(np.maximum(variance, 0.0))
        return mean, np.where(std > SMALLEST_DEVIATION, std, 1.0)


def feature_rows(item_ids: Sequence[str], values: np.ndarray) -> pa.Table:
    """Convert features [n, N_v, d_v] to rows of the `visual_features` table."""
    flat = np.ascontiguousarray(values, np.float32)
    size = int(np.prod(values.shape[1:]))
    return pa.table(
        {
            "item_id": pa.array(list(item_ids), pa.string()),
            "feature": pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), size),
        }
    )


def write_visual_features(
    uri: str, item_ids: Sequence[str], values: np.ndarray, items_hash: str, **facts: Any
) -> dict[str, Any]:
    """Write features [n, N_v, d_v] of any encoder, not standardised; returns the manifest.

    `items_hash` is the content hash of the items/ that they were computed from; mean and deviation
    are those of `values`. This imports features that were computed elsewhere.
    """
    write_table(feature_rows(item_ids, values), uri)
    return write_visual_manifest(
        uri, items_hash, values.shape[1:], Moments.of(values), with_image=len(item_ids), **facts
    )


def write_visual_manifest(
    uri: str, items_hash: str, shape: Sequence[int], moments: Moments, **facts: Any
) -> dict[str, Any]:
    """Write the manifest last, as it marks the folder complete; `shape` = (N_v, d_v)."""
    mean, std = moments.mean_and_std()
    facts |= {"num_tokens": int(shape[0]), "width": int(shape[1])}
    facts |= {"mean": mean.tolist(), "std": std.tolist()}
    return write_manifest(uri, KIND, parents={"items": items_hash}, **facts)


def _shape(catalog: Catalog, facts: dict[str, Any]) -> tuple[int, int, int]:
    return catalog.num_items, facts["num_tokens"], facts["width"]


def _other_catalogue(uri: str) -> InputError:
    return InputError(
        "visual features",
        uri,
        "belong to another catalogue; make them again with jobs/features.py DATA",
    )


def _fill(values: np.ndarray, uri: str, facts: dict[str, Any], catalog: Catalog) -> None:
    mean, std = (np.array(facts[name], np.float32) for name in ("mean", "std"))
    values[:] = np.nan
    for batch in _batches(uri):
        rows = catalog.rows(batch.column("item_id"))
        if (rows < 0).any():
            raise _other_catalogue(uri)
        found = batch.column("feature").flatten().to_numpy(zero_copy_only=False)
        values[rows] = (found.reshape(len(rows), *values.shape[1:]) - mean) / std


def _batches(uri: str) -> Iterator[pa.RecordBatch]:
    fs, _ = open_filesystem(uri)
    for name in data_files(uri, (".parquet",)):
        with fs.open(name, "rb") as source:
            yield from pq.ParquetFile(source).iter_batches(4096, columns=["item_id", "feature"])

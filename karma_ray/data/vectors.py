"""Vectors in a column of a table, mapped into memory once per node.

Legend: I rows of the table, n rows, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from karma_ray.artifacts import open_filesystem, table_files
from karma_ray.data.memory_map import mapped_array
from karma_ray.node_cache import known_hash
from karma_ray.node_disk import node_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray


def mapped_vectors(folder: str) -> NDArray[np.float32]:  # [I, D]
    """Return the vectors of a folder of embeddings from the node's copy, which processes share."""
    found = dataset(folder)
    shape = (found.count_rows(), found.schema.field("embedding").type.list_size)

    def fill(values: np.ndarray) -> None:
        start = 0
        for batch in found.to_batches(columns=["embedding"]):
            values[start : start + len(batch)] = vectors_of(batch.column("embedding"))
            start += len(batch)

    path = node_folder() / "embeddings" / f"{known_hash(folder)}.npy"
    return mapped_array(path, np.float32, shape, fill, writable=True)


def vectors_of(column: pa.Array) -> NDArray[np.float32]:  # [n, D]
    """Return the vectors in a column, in memory that torch may write to."""
    values = np.array(column.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)
    return values.reshape(-1, column.type.list_size)


def dataset(folder: str) -> ds.Dataset:
    """Return the Parquet files of a folder, of which nothing is read yet."""
    fs, _ = open_filesystem(folder)
    return ds.dataset(table_files(folder), filesystem=fs, format="parquet")

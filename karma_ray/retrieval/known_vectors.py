"""Vectors that are known already, by a hash of what was encoded: of an item's text and picture.

After a change of the catalogue only items whose hash is new have to be encoded. Embeddings carry
the hashes in a column, so whoever knows the bundle and how it computed can use them again.

Legend: n items, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from karma_ray.artifacts import read_table
from karma_ray.data.vectors import dataset, mapped_vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from karma_ray.data.pixels import PixelTable

COLUMN = "content"
"""The column of `item_embeddings` with the hashes."""
BYTES = 16
Hashes = np.ndarray
"""[n] of type S16: no two texts have the same, as far as anyone knows."""


def content_hashes(
    texts: Sequence[str], pictures: PixelTable | None = None, first_row: int = 0
) -> Hashes:  # [n]
    """Return the hashes of texts, and of the pictures of the catalogue rows from `first_row` on."""
    seen = None if pictures is None else pictures.values
    found = bytearray()
    for row, text in enumerate(texts, first_row):
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=BYTES)
        if seen is not None and seen[row, 0]:
            digest.update(b"\0")
            digest.update(seen[row].tobytes())
        found += digest.digest()
    return np.frombuffer(bytes(found), f"S{BYTES}")


def hash_column(hashes: Hashes) -> pa.Array:
    """Return hashes as a column of a table."""
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(BYTES), len(hashes), [None, pa.py_buffer(hashes.tobytes())]
    )


def hashes_of(table: pa.Table) -> Hashes | None:
    """Return the hashes of a table of embeddings, or None if it has none or not of all rows."""
    if COLUMN not in table.column_names or table.column(COLUMN).null_count:
        return None
    chunks = [
        np.frombuffer(chunk.buffers()[1], f"S{BYTES}")[chunk.offset : chunk.offset + len(chunk)]
        for chunk in table.column(COLUMN).chunks
        if len(chunk)
    ]
    return np.concatenate(chunks) if chunks else np.zeros(0, f"S{BYTES}")


class KnownVectors:
    """The vectors of one folder of embeddings by hash, mapped into memory once per node."""

    def __init__(self, folder: str) -> None:
        hashes = hashes_of(read_table(folder, columns=[COLUMN]))
        assert hashes is not None
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        self._vectors = mapped_vectors(folder)

    def find(self, hashes: Hashes) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Return the mask [n] of known hashes, and the vectors [known, D] of these."""
        places = np.searchsorted(self._sorted, hashes)
        places[places == len(self._sorted)] = 0
        known = self._sorted[places] == hashes if len(self._sorted) else np.zeros(len(hashes), bool)
        return known, self._vectors[self._order[places[known]]]


def has_hashes(folder: str) -> bool:
    """Whether a folder of embeddings has the column of hashes."""
    return COLUMN in dataset(folder).schema.names

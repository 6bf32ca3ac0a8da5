"""A hash of a table's values that is the same on every machine and for every file format."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def table_hash(table: pa.Table) -> str:
    """Return the SHA-256 (16 hex digits) of a table's column names and values, in order.

    Parquet files of equal tables differ between versions and settings of their writer, so their
    bytes cannot tell whether two machines have the same data.
    """
    digest = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        digest.update(f"{name}:{len(column)}:".encode())
        _add(digest, pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([]))
    return digest.hexdigest()[:16]


def _add(digest: Any, values: pa.Array) -> None:
    """Add the null mask, then the values with nulls as empty or 0: strings as lengths and bytes,
    lists as lengths and elements, numbers and times as 8 bytes, other types as JSON text."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind, is_ = values.type, pa.types
    _add_numbers(digest, values.is_valid(), np.uint8)
    if is_.is_string(kind) or is_.is_binary(kind) or is_.is_large_string(kind):
        _add_bytes(digest, values.cast(pa.large_binary()))
    elif is_.is_large_binary(kind):
        _add_bytes(digest, values)
    elif is_.is_list(kind) or is_.is_large_list(kind) or is_.is_fixed_size_list(kind):
        _add_numbers(digest, pc.fill_null(pc.list_value_length(values), 0), "<i8")
        _add(digest, values.flatten())
    elif is_.is_timestamp(kind) or is_.is_integer(kind):
        _add_numbers(digest, pc.fill_null(values.cast(pa.int64()), 0), "<i8")
    elif is_.is_boolean(kind):
        _add_numbers(digest, pc.fill_null(values, False), np.uint8)
    elif is_.is_floating(kind):
        _add_numbers(digest, pc.fill_null(values, 0.0), "<f8")
    else:
        digest.update(json.dumps(values.to_pylist(), default=str, sort_keys=True).encode())


def _add_bytes(digest: Any, values: pa.Array) -> None:
    """Add the lengths, then all bytes; bytes of null values do not count."""
    filled = pc.fill_null(values, b"")
    _, offsets, content = filled.buffers()
    ends = np.frombuffer(offsets, "<i8")[filled.offset : filled.offset + len(filled) + 1]
    digest.update(np.diff(ends).tobytes())
    if content is not None and len(ends):
        digest.update(memoryview(content)[int(ends[0]) : int(ends[-1])])


def _add_numbers(digest: Any, values: pa.Array, dtype: Any) -> None:
    digest.update(values.to_numpy(zero_copy_only=False).astype(dtype).tobytes())

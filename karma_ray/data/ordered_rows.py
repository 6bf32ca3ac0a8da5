"""Files of rows in the order of an integer key, of which any range of keys is read.

A file is of Arrow and has many small record batches, of which a reader takes those of its range.
"""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa

from karma_ray.artifacts import open_filesystem, write_bytes

BATCH_BYTES = 1 << 18
"""Bytes of a record batch, about, before it is compressed."""
_FIRST_KEYS = b"first_slots"


def write_ordered(rows: pa.Table, keys: np.ndarray, uri: str) -> None:
    """Write rows by their keys [rows] int64, and in their own order within a key."""
    by_key = np.argsort(keys, kind="stable")
    ordered = rows.append_column("slot", pa.array(keys)).take(pa.array(by_key)).combine_chunks()
    batch_rows = max(16, BATCH_BYTES * ordered.num_rows // max(1, ordered.nbytes))
    first_keys = json.dumps(keys[by_key][::batch_rows].tolist())
    schema = ordered.schema.with_metadata({_FIRST_KEYS: first_keys.encode()})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_table(ordered, max_chunksize=batch_rows)
    write_bytes(sink.getvalue().to_pybytes(), uri)


def read_ordered(uri: str, keys: tuple[int, int], schema: pa.Schema) -> pa.Table:
    """Read the rows with keys[0] <= key < keys[1] from one file whose rows have `schema`."""
    fs, path = open_filesystem(uri)
    with fs.open(path, "rb", cache_type="none") as source:
        file = pa.ipc.open_file(source)
        first_keys = np.array(json.loads(file.schema.metadata[_FIRST_KEYS]), dtype=np.int64)
        first = max(0, int(np.searchsorted(first_keys, keys[0], side="left")) - 1)
        end = int(np.searchsorted(first_keys, keys[1], side="left"))
        kept = [_within(file.get_batch(number), keys) for number in range(first, end)]
    return pa.Table.from_batches(kept, schema)


def _within(batch: pa.RecordBatch, keys: tuple[int, int]) -> pa.RecordBatch:
    """Return a copy of the rows of a range of keys, which does not keep the others in memory."""
    first, end = np.searchsorted(batch.column("slot").to_numpy(), keys)
    return batch.drop_columns(["slot"]).take(pa.array(np.arange(first, end)))

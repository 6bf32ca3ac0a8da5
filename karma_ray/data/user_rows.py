"""The clean rows of a part, ordered by user, so that any partition of users is read from a range.

Legend: n = `prepare.num_partitions`, P = n 2^k partitions, c the CRC-32 of a user's id.

A user is in partition c mod P. How many partitions there are is known only when the whole log is,
so rows are ordered by *slot*: all that c mod n 2^16 says, with its bits turned round. Every
partition is then a range of slots, whatever k is, and files need not be written again when a log
has grown.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from karma_ray.data.ordered_rows import read_ordered, write_ordered
from karma_ray.data.validation import CLEAN_EVENTS

BITS = 16
"""Doublings of `prepare.num_partitions` that a file of rows serves."""


def num_partitions(fewest: int, cells: int, partition_cells: int) -> int:
    """Return the least fewest * 2^k with at most `partition_cells` per partition on average."""
    doublings = 0
    while doublings < BITS and cells > partition_cells * (fewest << doublings):
        doublings += 1
    return fewest << doublings


def partition_of(user_ids: pa.ChunkedArray, num_partitions: int) -> pa.ChunkedArray:
    """Return the partition [rows] int32 of each user, by a hash equal in every process."""
    partition = (_crc(user_ids) % num_partitions).astype(np.int32)
    return pa.chunked_array([pa.array(partition)])


def slots_of(user_ids: pa.ChunkedArray, fewest: int) -> np.ndarray:
    """Return the slot [rows] int64 of each user."""
    crc = _crc(user_ids)
    slots: np.ndarray = ((crc % fewest) << BITS) + _turned(crc // fewest, BITS)
    return slots


def slot_range(partition: int, num_partitions: int, fewest: int) -> tuple[int, int]:
    """Return the first slot of a partition, and one past the last."""
    doublings = (num_partitions // fewest).bit_length() - 1
    turned = int(_turned(np.array([partition // fewest]), doublings)[0]) if doublings else 0
    length = 1 << (BITS - doublings)
    first = ((partition % fewest) << BITS) + turned * length
    return first, first + length


def write_rows(clean: pa.Table, uri: str, fewest: int) -> None:
    """Write clean events (CLEAN_EVENTS) by slot, and in the order of the rows within a slot."""
    write_ordered(clean, slots_of(clean["user_id"], fewest), uri)


def read_rows(uri: str, slots: tuple[int, int]) -> pa.Table:
    """Read the rows (CLEAN_EVENTS) of a range of slots from one file."""
    return read_ordered(uri, slots, CLEAN_EVENTS)


def newest(rows: pa.Table, most: int) -> pa.Table:
    """Keep the `most` newest rows of every user, by time and then by `order`."""
    users = pc.value_counts(rows["user_id"].combine_chunks())
    if len(users) == 0 or pc.max(users.field("counts")).as_py() <= most:
        return rows
    frame = pl.DataFrame(pl.from_arrow(rows.select(["user_id", "timestamp", "order"])))
    age = pl.int_range(pl.len()).over("user_id", order_by=["timestamp", "order"], descending=True)
    return rows.filter(pa.array(frame.select(age < most).to_series().to_numpy()))


def joined(tables: Sequence[pa.Table], offsets: Sequence[int]) -> pa.Table:
    """Join the rows of several parts; `offsets` make `order` the row's number in the whole log."""
    place = CLEAN_EVENTS.get_field_index("order")
    numbered = [
        table.set_column(place, "order", pc.add(table["order"], offset))
        for table, offset in zip(tables, offsets, strict=True)
        if table.num_rows
    ]
    return pa.concat_tables([CLEAN_EVENTS.empty_table(), *numbered])


def _crc(user_ids: pa.ChunkedArray) -> np.ndarray:
    """Return the CRC-32 [rows] int64 of each id."""
    coded = pc.dictionary_encode(pa.concat_arrays([pa.array([], pa.string()), *user_ids.chunks]))
    users = coded.dictionary.to_pylist()
    of_user = np.fromiter((zlib.crc32(user.encode()) for user in users), np.int64, len(users))
    return np.asarray(of_user[coded.indices.to_numpy()])


def _turned(value: np.ndarray, bits: int) -> np.ndarray:
    """Return the lowest `bits` bits of non-negative integers in reverse order."""
    turned = np.zeros_like(value)
    for bit in range(bits):
        turned |= ((value >> bit) & 1) << (bits - 1 - bit)
    return turned

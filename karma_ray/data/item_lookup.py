"""Item ids -> catalogue rows by a sorted table of hashes, which a node's processes share.

A Python dictionary of 10^7 ids takes gigabytes in every process. Here a process holds no id: the
table has a hash and a row number per item (16 bytes), is written once per node and mapped into
memory, and an id counts as found only if it equals the catalogue's, so equal hashes do no harm.

Legend: n ids looked up, I items.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from karma_ray.data.draws import mixed
from karma_ray.data.memory_map import mapped_array

FORMAT = 1
"""Raised when the hash or the layout changes, so that old files are ignored."""
CHUNK = 65_536
"""Ids hashed at once, which bounds the memory of the process that writes the table."""
FEW = 10_000
"""Up to so many ids a dictionary (a megabyte or two) answers sooner, and is used instead."""
_WORD = 8


class ItemLookup:
    """The rows of ids in a column without repeated ids."""

    def __init__(self, ids: pa.ChunkedArray, copy: Path | None = None) -> None:
        """`copy` is the node's file that the column is mapped from; the table lies beside it.

        Without a copy the table is built in this process.
        """
        self._few: dict[str, int] | None = None
        if len(ids) <= FEW:
            self._few = {item_id: row for row, item_id in enumerate(ids.to_pylist())}
            return
        self._chunks = ids.chunks
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks])
        shape = (2, len(ids))
        if copy is None:
            table = np.empty(shape, np.uint64)
            self._fill(table)
        else:
            path = copy.with_name(f"{copy.stem}-{FORMAT}.lookup.npy")
            table = mapped_array(path, np.uint64, shape, self._fill)
        self._hashes, self._numbers = table[0], table[1].view(np.int64)

    def rows(self, ids: pa.Array) -> np.ndarray:
        """Return the row numbers [n] int64 of ids; -1 for unknown ones and for null."""
        if self._few is not None:
            known = map(self._few.get, ids.to_pylist(), repeat(-1))
            return np.fromiter(known, np.int64, len(ids))
        wanted = text_hashes(ids)
        places = self._hashes.searchsorted(wanted)
        found: np.ndarray = self._numbers.take(places, mode="clip")
        wrong = np.flatnonzero(~self._equal(ids, found))
        found[wrong] = -1
        # An id may lie behind others with its hash.
        while len(wrong := wrong[self._hashes.take(places[wrong], mode="clip") == wanted[wrong]]):
            places[wrong] += 1
            rows = self._numbers.take(places[wrong], mode="clip")
            equal = self._equal(ids.take(pa.array(wrong)), rows)
            found[wrong[equal]] = rows[equal]
            wrong = wrong[~equal & (places[wrong] < len(self._hashes))]
        return found

    def _equal(self, ids: pa.Array, rows: np.ndarray) -> np.ndarray:
        """Whether each id [m] is that of its row [m]; null equals nothing."""
        if len(self._chunks) == 1:
            there = self._chunks[0].take(pa.array(rows))
        else:
            there = self._taken(rows)
        equal = pc.equal(there, ids)
        known = pc.fill_null(equal, False) if equal.null_count else equal
        return np.asarray(known.to_numpy(zero_copy_only=False))

    def _taken(self, rows: np.ndarray) -> pa.Array:
        """Take ids from several chunks; Arrow would first copy all of them into one."""
        chunk_of = np.searchsorted(self._ends, rows, side="right")
        order = np.argsort(chunk_of, kind="stable")
        parts = []
        for number in np.unique(chunk_of):
            chunk = self._chunks[number]
            inside = rows[chunk_of == number] - (self._ends[number] - len(chunk))
            parts.append(chunk.take(pa.array(inside)))
        return pa.concat_arrays(parts or [self._chunks[0][:0]]).take(pa.array(np.argsort(order)))

    def _fill(self, table: np.ndarray) -> None:
        """Write the hashes in ascending order, and the row of each."""
        hashes = np.empty(table.shape[1], np.uint64)
        start = 0
        for part in self._parts():
            hashes[start : start + len(part)] = text_hashes(part)
            start += len(part)
        order = np.argsort(hashes, kind="stable")
        table[0], table[1] = hashes[order], order

    def _parts(self) -> Iterator[pa.Array]:
        for chunk in self._chunks:
            for start in range(0, len(chunk), CHUNK):
                yield chunk.slice(start, CHUNK)


def text_hashes(texts: pa.Array) -> np.ndarray:
    """Return 64-bit hashes [n] uint64 of the bytes of texts, the same on every machine."""
    wide = pa.types.is_large_string(texts.type)
    _, ends, content = texts.buffers()
    if not len(texts):
        return np.empty(0, np.uint64)
    first_end = texts.offset * (8 if wide else 4)
    bounds = np.frombuffer(ends, "<i8" if wide else "<i4", len(texts) + 1, first_end)
    bounds = bounds.astype(np.int64)
    first, last = bounds[0], bounds[-1]
    held = np.zeros(last - first + _WORD, np.uint8)  # every text may be read a word too far
    if content is not None:
        held[: last - first] = np.frombuffer(content, np.uint8)[first:last]
    words = np.ndarray((last - first + 1,), "<u8", held, strides=(1,))  # at every byte
    starts, sizes = bounds[:-1] - first, np.diff(bounds)
    shortest, longest = int(sizes.min()), int(sizes.max())
    state = mixed(sizes.view(np.uint64))
    for done in range(0, longest, _WORD):
        if done + _WORD <= shortest:
            state = mixed(state ^ words[starts + done])
            continue
        here = np.flatnonzero(sizes > done)
        unused = np.maximum(done + _WORD - sizes[here], 0).view(np.uint64) << np.uint64(3)
        word = words[starts[here] + done] << unused
        state[here] = mixed(state[here] ^ word)
    return np.asarray(state)

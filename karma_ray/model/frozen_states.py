"""The states of all items after the frozen layers: a file that is made once and memory-mapped.

The file holds the states of the real tokens of every item, one item behind the other, in the
order of the catalogue. It is written in portions, so a killed writer continues where it was, and
gets its name only when it is complete.

Legend: I items, N real tokens of all of them, n of some, L tokens, D width of the body.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from karma_ray.artifacts import locked
from karma_ray.errors import StorageError

PORTION = 1024
"""Items that are computed and written at once."""
KINDS: dict[str, np.dtype[Any]] = {"bfloat16": np.dtype(np.int16), "float32": np.dtype(np.float32)}
"""How the file holds the states of a precision: numpy has no bfloat16, so it holds its bits."""

EncodePortions = Callable[[list[int]], Iterator[tuple[int, np.ndarray]]]
"""Numbers of portions -> (number, states [n, D] as the file holds them), in any order."""


@dataclass(frozen=True)
class FrozenStates:
    """The states after the frozen layers, by catalogue row."""

    values: np.ndarray  # [N, D] float32, or bfloat16 as int16
    counts: np.ndarray  # [I] real tokens of each item, with the instruction

    @classmethod
    def open(cls, path: str, counts: np.ndarray) -> FrozenStates:
        """Map a complete file; its pages are shared by all processes of the node."""
        return cls(np.load(path, mmap_mode="r"), counts)

    @cached_property
    def starts(self) -> np.ndarray:
        """First state of each item, and the end [I + 1]."""
        return np.append(0, self.counts.cumsum())

    def gather(self, rows: np.ndarray, counts: np.ndarray) -> Tensor:
        """Return the states [n, D] of the items at `rows`, which have `counts` real tokens.

        Raises ValueError if the file was made of texts of other lengths.
        """
        if not np.array_equal(self.counts[rows], counts):
            raise ValueError("the states after the frozen layers belong to other texts")
        begins = np.cumsum(counts) - counts
        index = np.arange(counts.sum()) + np.repeat(self.starts[rows] - begins, counts)
        found = torch.from_numpy(self.values[index])
        return found.view(torch.bfloat16) if found.dtype == torch.int16 else found


def write_states(
    path: str, counts: np.ndarray, width: int, precision: str, encode: EncodePortions
) -> None:
    """Make the file of [N, width] states at `path` unless it exists; one process does.

    Raises StorageError when the disk has no room for it.
    """
    target = Path(path)
    with locked(path):
        if target.exists():
            return
        shape, kind = (int(counts.sum()), width), KINDS[precision]
        draft, marks = target.with_suffix(".partial"), target.with_suffix(".done")
        starts = np.append(0, counts.cumsum())
        num_portions = -(-len(counts) // PORTION)
        _check_room(target, draft, shape, kind)
        begin = _open_draft(draft, marks, shape, kind, num_portions)
        missing = [n for n, mark in enumerate(marks.read_bytes()) if not mark]
        with draft.open("r+b") as data, marks.open("r+b") as done:
            for number, states in encode(missing) if missing else ():
                first = number * PORTION
                end = min(first + PORTION, len(counts))
                assert states.shape == (starts[end] - starts[first], width)
                data.seek(begin + int(starts[first]) * width * kind.itemsize)
                data.write(states.astype(kind).tobytes())
                data.flush()
                done.seek(number)  # only now: what is marked has been written
                done.write(b"\1")
                done.flush()
            os.fsync(data.fileno())
        os.replace(draft, target)
        marks.unlink()


def _check_room(target: Path, draft: Path, shape: tuple[int, int], kind: np.dtype[Any]) -> None:
    """Raise StorageError before hours of work, not after them."""
    needed = shape[0] * shape[1] * kind.itemsize
    there = draft.stat().st_blocks * 512 if draft.exists() else 0
    free = shutil.disk_usage(target.parent).free
    if free + there < needed:
        sizes = f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free"
        raise StorageError("states after the frozen layers", str(target), sizes)


def _open_draft(
    draft: Path, marks: Path, shape: tuple[int, int], kind: np.dtype[Any], num_portions: int
) -> int:
    """Keep the draft of a killed writer, or start one; returns where its data begin."""
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    kept = draft.exists() and marks.exists() and marks.stat().st_size == num_portions
    with draft.open("r+b" if kept else "w+b") as sink:
        np.lib.format.write_array_header_1_0(sink, header)
        begin = sink.tell()
        sink.truncate(begin + shape[0] * shape[1] * kind.itemsize)
    if not kept:
        marks.write_bytes(bytes(num_portions))
    return begin

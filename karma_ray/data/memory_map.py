"""Arrays that a node computes once, in files that all its processes map into memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from karma_ray.node_disk import kept


def mapped_array(
    path: Path,
    kind: DTypeLike,
    shape: tuple[int, ...],
    fill: Callable[[np.ndarray], None],
    *,
    writable: bool = False,
) -> np.ndarray:
    """Return the array in the file at `path`, read-only; if it is missing, `fill` writes it.

    A `writable` one may be written to, which copies the pages for this process alone and never
    changes the file.

    One process writes while the others wait, because the workers of a node start together. The
    file appears only when it is complete.
    """
    kept(path, lambda: _write(path, kind, shape, fill))
    return np.asarray(np.load(path, mmap_mode="c" if writable else "r"))


def _write(
    path: Path, kind: DTypeLike, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]
) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        values = np.lib.format.open_memmap(temporary, "w+", kind, shape)
        fill(values)
        values.flush()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)

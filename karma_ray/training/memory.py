"""When glibc keeps freed memory, and when it gives it back to the operating system."""

from __future__ import annotations

import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt(3)
_LARGE = 2**30


def keep_heap() -> bool:
    """Let glibc keep what a step frees for the next step; False where the C library cannot.

    By default large tensors are mapped and unmapped in every step, and each page is faulted in
    anew. `trim_heap` gives back what piles up.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    return tune is not None and bool(
        tune(_MMAP_THRESHOLD, _LARGE) and tune(_TRIM_THRESHOLD, 2 * _LARGE - 1)
    )


def trim_heap() -> bool:
    """Return the free pages of glibc's heap; False where the C library cannot.

    Batches differ in shape from step to step, and glibc keeps the holes they leave: on the toy
    shop a worker stood at 2.7 GB after 160 steps, of which 1.4 GB were holes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True

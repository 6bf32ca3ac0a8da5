"""Freed memory back to the operating system."""

from __future__ import annotations

import ctypes


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

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from karma_ray.training.memory import trim_heap


def _resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_holes_between_live_blocks_go_back_to_the_system() -> None:
    if not trim_heap():
        pytest.skip("this C library has no malloc_trim")
    # Below the size that glibc maps apart, so the freed half stays in the heap as holes.
    blocks = [bytearray(b"x" * 60_000) for _ in range(4_000)]
    full = _resident()
    kept = blocks[::8]
    del blocks
    trim_heap()
    assert len(kept) == 500
    assert full - _resident() > 100_000  # of about 240,000 KiB

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from karma_ray.model.backbone import build_tiny
from karma_ray.model.config import TinyBackboneConfig
from karma_ray.training import memory
from karma_ray.training.memory import tokens_at_once, trim_heap


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


def test_more_free_memory_and_fewer_trained_layers_take_more_tokens_at_once(monkeypatch) -> None:
    body, device = build_tiny(TinyBackboneConfig(num_layers=4), 300, 0), torch.device("cpu")
    assert tokens_at_once(body, 0, device) == memory.ON_A_CPU

    def tokens(free: int, num_frozen: int = 0) -> int:
        monkeypatch.setattr(memory, "_free_bytes", lambda device: free)
        return tokens_at_once(body, num_frozen, device)

    assert tokens(2 * 2**30) == pytest.approx(2 * tokens(2**30), rel=1e-3)
    assert tokens(2**30, 3) == pytest.approx(4 * tokens(2**30), rel=1e-3)
    assert tokens(1) == memory.FEWEST

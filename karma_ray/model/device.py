"""The device of a process."""

from __future__ import annotations

import torch


def this_device(device: torch.device | str | None = None) -> torch.device:
    """Return `device`, or if it is None this process's GPU, or the CPU if it has none."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

"""What a run costs: seconds of its stages, and the peak memory of its processes."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from karma_ray.artifacts import RunFolder, exists, join, read_json, write_json
from karma_ray.runs.stages import Stage


def peak_gib() -> dict[str, float]:
    """Return the peak memory of this process, and of its part of the GPU."""
    # ru_maxrss is in kilobytes on Linux.
    peak = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}
    if torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return peak


class Cost:
    """Seconds of the stages that RUN/metrics.jsonl does not time, for RUN/cost.json."""

    def __init__(self) -> None:
        self._started, self._seconds = time.time(), dict[str, float]()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the time inside as that of `stage`."""
        started = time.perf_counter()
        yield
        self._seconds[stage] = round(time.perf_counter() - started, 1)

    def save(self, run: str, stage: Stage | None) -> float:
        """Write RUN/cost.json: seconds by stage, and the largest peak of driver and worker.

        Returns the seconds since this object was made.
        The states of frozen layers count as when they were computed, also if they were kept.
        """
        frozen = stage.frozen.seconds() if stage is not None and stage.frozen else None
        seconds = {} if frozen is None else {"frozen": frozen}
        peaks = peak_gib()
        summary = join(RunFolder(run).checkpoints, "joint", "final", "summary.json")
        worker = read_json(summary).get("peak_gib", {}) if exists(summary) else {}
        for kind, peak in worker.items():
            peaks[kind] = max(peak, peaks.get(kind, 0.0))
        facts: dict[str, Any] = {"seconds": seconds | self._seconds, "peak_gib": peaks}
        write_json(facts, RunFolder(run).path("cost.json"))
        return round(time.time() - self._started, 1)

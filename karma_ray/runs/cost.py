"""What a run costs: its way to the first step, seconds of its stages, and peak memory."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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


def process_began() -> float:
    """Return when this process began, in seconds since 1970; now, where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])  # field 22 of proc(5): after boot, in ticks of the clock
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError):  # not Linux
        age = 0.0
    return time.time() - age


LAST_STAGES = ("joint", "ctr")
"""The stage that trains what a run is for: a model for recall, or a CTR model."""


class Cost:
    """What RUN/metrics.jsonl does not time, for RUN/cost.json: moments of the driver, stages."""

    def __init__(self) -> None:
        self._started, self._seconds = time.time(), dict[str, float]()
        self._reached = {"process": process_began(), "libraries": self._started}

    def reached(self, moment: str) -> None:
        """Note that the driver has come to this moment on its way to the first step."""
        self._reached[moment] = time.time()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the time inside as that of `stage`."""
        started = time.perf_counter()
        yield
        self._seconds[stage] = round(time.perf_counter() - started, 1)

    def save(self, run: str, stage: Stage | None) -> float:
        """Write RUN/cost.json: seconds by stage, moments, and the largest peak of any process.

        Returns the seconds since this object was made. Moments are those of the driver and of the
        worker of rank 0 in its last stage, in seconds since 1970.
        The states of frozen layers count as when they were computed, also if they were kept.
        """
        frozen = stage.frozen.seconds() if stage is not None and stage.frozen else None
        seconds = {} if frozen is None else {"frozen": frozen}
        peaks = peak_gib()
        summaries = (
            join(RunFolder(run).checkpoints, name, "final", "summary.json") for name in LAST_STAGES
        )
        worker: dict[str, Any] = next((read_json(path) for path in summaries if exists(path)), {})
        for kind, peak in worker.get("peak_gib", {}).items():
            peaks[kind] = max(peak, peaks.get(kind, 0.0))
        reached = {"driver": self._reached, "worker": worker.get("reached", {})}
        facts: dict[str, Any] = {
            "seconds": seconds | self._seconds, "peak_gib": peaks, "reached": reached,
        }  # fmt: skip
        write_json(facts, RunFolder(run).path("cost.json"))
        return round(time.time() - self._started, 1)

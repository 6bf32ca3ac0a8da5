"""A profiler trace of a few training steps, with the time of each operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from karma_ray.artifacts import join, open_filesystem
from karma_ray.training.parallel import rank

WAIT, WARM_UP, ACTIVE = 5, 2, 3
"""Steps before the trace (first batches are slow), steps to warm up the profiler, traced steps."""


@contextmanager
def profiled(folder: str | None) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step.

    Writes `trace-<rank>.json` (chrome://tracing, ui.perfetto.dev) and `operators-<rank>.txt`, the
    operators sorted by their own time, to `folder`; does nothing without a folder.
    """
    if folder is None:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)

    def write(found: profile) -> None:
        fs, path = open_filesystem(folder)
        fs.makedirs(path, exist_ok=True)
        sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        with fs.open(join(path, f"operators-{rank()}.txt"), "w") as sink:
            sink.write(found.key_averages().table(sort_by=sort, row_limit=40))
        if "file" in fs.protocol:  # the profiler writes to local files only
            found.export_chrome_trace(join(path, f"trace-{rank()}.json"))

    plan = schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as running:
        yield running.step

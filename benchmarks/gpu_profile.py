"""Where the time of a training step goes: kernels, launches, idle time, waits of the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_workload import train
from karma_ray.data.batch import Batch
from karma_ray.model.karma import KarmaModel
from karma_ray.training.step import JointStep

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = (
    "aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero",
    "aten::_unique2", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize",
    "cudaMalloc",
)  # fmt: skip
"""Operators whose result the host must know, and calls in which it waits."""


def profile_step(
    model: KarmaModel, step: JointStep, batches: Sequence[Batch], top: int = 15
) -> dict[str, Any]:
    """Facts about a step, from a trace of three."""
    device, count = next(model.parameters()).device, 3
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    train(model, step, batches, 60.0, count)  # warm
    with profile(activities=activities) as trace:
        train(model, step, batches, 60.0, count)
    events = list(trace.events() or ())
    calls = Counter(event.name for event in events)
    on_device = [
        event
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
        and "#" not in event.name  # a named span such as Optimizer.step#AdamW.step
        and not getattr(event, "is_user_annotation", False)
    ]
    kernels = [event for event in on_device if not event.name.startswith("Mem")]
    facts: dict[str, Any] = {
        "steps": count,
        "operators_per_step": round(sum(n for k, n in calls.items() if "::" in k) / count, 1),
        "launches_per_step": round(sum(calls[name] for name in LAUNCHES) / count, 1),
        "waits_per_step": {n: round(calls[n] / count, 1) for n in WAITS if calls[n]},
        "copies_per_step": _copies(on_device, count),
        **_busy(on_device),
    }
    return {**facts, "top": _top(kernels, count) if kernels else _top_operators(trace, count, top)}


def _copies(events: Iterable[Any], count: int) -> dict[str, float]:
    found = Counter(event.name for event in events if event.name.startswith("Mem"))
    return {name: round(number / count, 1) for name, number in found.most_common()}


def _busy(events: Sequence[Any]) -> dict[str, float]:
    """Share of the time from the first kernel to the last in which none ran, and the gaps."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    if not spans:
        return {}
    idle, gaps, end = 0.0, 0, spans[0][1]
    for start, stop in spans:
        if start > end:
            idle += start - end
            gaps += 1
        end = max(end, stop)
    whole = end - spans[0][0]
    share = round(idle / max(whole, 1e-9), 4)
    return {"device_idle_share": share, "gaps": gaps, "traced_ms": round(whole / 1e3, 2)}


def _top(kernels: Iterable[Any], count: int, most: int = 15) -> list[dict[str, Any]]:
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in kernels:
        spent[event.name] += event.time_range.elapsed_us()
        calls[event.name] += 1
    whole = max(sum(spent.values()), 1e-9)
    return [
        {
            "kernel": name[:120],
            "ms_per_step": round(time / 1e3 / count, 3),
            "share": round(time / whole, 4),
            "calls_per_step": round(calls[name] / count, 1),
        }
        for name, time in spent.most_common(most)
    ]


def _top_operators(trace: profile, count: int, most: int) -> list[dict[str, Any]]:
    rows = sorted(trace.key_averages(), key=lambda row: -row.self_cpu_time_total)
    whole = max(sum(row.self_cpu_time_total for row in rows), 1e-9)
    return [
        {
            "kernel": row.key[:120],
            "ms_per_step": round(row.self_cpu_time_total / 1e3 / count, 3),
            "share": round(row.self_cpu_time_total / whole, 4),
            "calls_per_step": round(row.count / count, 1),
        }
        for row in rows[:most]
    ]

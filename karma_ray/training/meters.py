"""Means of the logs between two reports, over steps and workers, and the training speed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from karma_ray.training.flops import peak_flops
from karma_ray.training.parallel import global_sum, world_size

if TYPE_CHECKING:
    from karma_ray.training.step import StepOutput

COUNTS = ("tokens", "examples", "flops")
"""Logs that count this worker's part and are summed over workers; other logs are already global,
or are averaged."""


class Meters:
    """Accumulates logs on their device, so that only a report waits for the accelerator.

    A log that appears only in some steps (a costly probe) is averaged over those steps; every
    worker must log the same names in the same steps.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """`dtype` is the compute type, whose peak is the reference of the FLOPs utilisation."""
        self._dtype = dtype
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._start = time.perf_counter()
        self._wait = 0.0
        self.num_steps = 0
        self._device = torch.device("cpu")

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for a batch."""
        self._wait += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude time that is not training (a checkpoint, an evaluation) from the speed."""
        outside = time.perf_counter()
        yield
        self._start += time.perf_counter() - outside

    def add(self, output: StepOutput, grad_norm: Tensor) -> None:
        """Add one step."""
        logs = dict(output.logs)
        if "loss/total" not in logs:
            # A worker's loss is its share of the global one.
            logs["loss/total"] = output.loss.detach() * world_size()
        # The norm is equal on all workers, so averaging does not change it.
        logs["grad_norm"] = grad_norm
        for name, value in logs.items():
            self._take(name, torch.as_tensor(value))  # numbers of the host stay there
        self.num_steps += 1
        self._device = output.loss.device

    def note(self, probes: dict[str, float]) -> None:
        """Add the metrics of a reporting step's batch."""
        for name, value in probes.items():
            self._take(name, torch.as_tensor(value))

    def _take(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()
        self._counts[name] = self._counts.get(name, 0) + 1

    def record(self, step: int, rate: float) -> dict[str, float]:
        """Return the means since the last call, and reset."""
        names = sorted(self._sums)
        means = [(self._sums[name] / self._counts[name]).to(self._device) for name in names]
        totals = global_sum(torch.stack(means)).tolist()
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        record: dict[str, float] = {"step": step, "seconds": elapsed}
        for name, total in zip(names, totals, strict=True):
            record[name] = total if name in COUNTS else total / world_size()
        record["lr"] = rate
        record["steps_per_s"] = self.num_steps / elapsed
        for name in COUNTS:
            if name in record:
                record[f"{name}_per_s"] = record[name] * self._counts[name] / elapsed
        if record.pop("flops", 0.0):
            # FLOPs of all workers together, relative to the peak of all their devices.
            peak = peak_flops(self._device, self._dtype) * world_size()
            record["mfu"] = record.pop("flops_per_s") / peak
        record["data_wait_share"] = self._wait / elapsed
        self._reset()
        return record

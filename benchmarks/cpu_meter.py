"""What the steps of a worker cost its process, which other work on the machine hardly changes."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from karma_ray.training.loop import Prepare
from karma_ray.training.parallel import barrier, global_sum
from karma_ray.training.step_state import StepState


@dataclass
class CpuMeter:
    """Stands before the steps of a worker, and measures all of them from step `warm` on.

    Before that the heap grows, and kernels are chosen. The training's `before_step` is `inner`.
    """

    inner: Prepare
    steps: int
    warm: int
    _begun: tuple[float, ...] = ()

    def __call__(self, model: nn.Module, step: int, state: StepState) -> StepState:
        """Do what was to be done before the step."""
        if step == self.warm:
            barrier()
            self._begun = _used()
        return self.inner(model, step, state)

    def totals(self, model: nn.Module, step: int) -> Mapping[str, float]:
        """Return CPU seconds of all workers for each step, and page faults; a collective.

        `others_per_step` is the part of threads other than the one that trains.
        """
        spent = [now - before for now, before in zip(_used(), self._begun, strict=True)]
        found = global_sum(torch.tensor(spent, dtype=torch.float64)) / (self.steps - self.warm)
        process, thread, faults = found.tolist()
        return {
            "cpu_per_step": process,
            "others_per_step": process - thread,
            "page_faults_per_step": faults,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }


def _used() -> tuple[float, ...]:
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return time.process_time(), time.thread_time(), float(faults)

"""The executor of a run: where its heavy parts are computed.

Everything else in a run is the same on a laptop and on a cluster. `jobs/` passes the record of
cluster/executor.py; by default everything happens in this process, without Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from karma_ray.config import Config
from karma_ray.data.tasks import RunTasks, run_here
from karma_ray.model.device import using_gpus
from karma_ray.runs.evaluation_shares import Enlist
from karma_ray.runs.frozen_outputs import EncodeRemotely
from karma_ray.runs.node_hours import Count, this_machine
from karma_ray.runs.training import Distribute

Embed = Callable[[str, str, str], Any]
"""(bundle, data, out): embeds every item of `data` with a bundle and writes the folder `out`."""

Measure = Callable[[Callable[[], dict[str, Any]]], dict[str, Any]]
"""Calls a function that evaluates a finished run, and returns the metrics that it returns."""


@dataclass(frozen=True)
class Executor:
    """The functions that do the heavy parts of a run."""

    prepare: RunTasks = run_here
    """Checks the events and builds the partitions of users."""
    train: Distribute | None = None
    """Trains with `training.num_workers` workers; None trains in this process."""
    freeze: EncodeRemotely | None = None
    """Computes the outputs of frozen layers; None computes them in this process."""
    embed: Embed | None = None
    """Embeds the catalogue for serving; None uses the model in this process."""
    measure: Measure | None = None
    """Evaluates a trained run; None evaluates in this process."""
    enlist: Enlist | None = None
    """Starts processes that share in an evaluation that takes long; None lets one do it all."""
    count_nodes: Count = this_machine
    """Returns how many machines of each kind are up."""

    def measured(
        self, config: Config, is_trained: bool, measure: Callable[[Enlist | None], dict[str, Any]]
    ) -> dict[str, Any]:
        """Call `measure` where a run of `config` is evaluated, with what enlists other processes.

        That is this process alone for a run without workers.
        """
        if not config.training.num_workers:
            return measure(None)
        if not is_trained or self.measure is None:
            return measure(self.enlist)
        with using_gpus(config.training.use_gpu != "false"):
            return self.measure(partial(measure, self.enlist))


HERE = Executor()
"""Everything in this process."""

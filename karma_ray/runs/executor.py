"""Who does the three heavy parts of a run: this process, or whatever the caller brings.

A run is the same on a laptop and on a cluster but for these. `jobs/` passes the record of
cluster/executor.py; with none given, everything happens in this process and without Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from karma_ray.runs.preparation import LocalShuffle, Shuffle
from karma_ray.runs.training import Distribute

Embed = Callable[[str, str, str], Any]
"""(bundle, data, out): embeds every item of `data` with a bundle into the folder `out`."""


@dataclass(frozen=True)
class Executor:
    """What a run needs of the machines it has."""

    prepare: Shuffle = field(default_factory=LocalShuffle)
    """Checks events and builds partitions of users."""
    train: Distribute | None = None
    """Trains with `training.num_workers` workers; None trains in this process."""
    embed: Embed | None = None
    """Embeds the catalogue for serving; None uses the model in this process."""


HERE = Executor()
"""Everything in this process."""

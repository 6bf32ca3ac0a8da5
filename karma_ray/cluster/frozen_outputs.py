"""The outputs of frozen layers with a pool of encoders on Ray.

Workers read the text from their node's catalogue, so only numbers of portions travel there, and
states travel back to the process that writes the file.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from karma_ray.cluster.accelerators import device_here, encoders
from karma_ray.cluster.pool import encoded
from karma_ray.cluster.session import connect
from karma_ray.cluster.waiting import telling, topic_of
from karma_ray.runs.frozen_outputs import FrozenOutputs


class PortionEncoder:
    """One actor: the frozen layers of a run's item encoder, and the catalogue's tokens."""

    def __init__(self, outputs: FrozenOutputs, topic: str = "") -> None:
        torch.set_num_threads(1)
        # Without a topic this is no worker that Ray has given a device.
        self.portions = outputs.portions(device_here(topic) if topic else None)

    def encode(self, number: int) -> tuple[int, np.ndarray]:
        """Return the number of a portion and its states."""
        return number, self.portions.portion(number)


def encode_on_ray(
    outputs: FrozenOutputs, width: int, missing: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Compute portions on all GPUs that the cluster has or may add, or else on its CPUs."""
    connect()
    pool = encoders("computing the outputs of frozen layers", len(missing))
    made_of = (outputs, topic_of("frozen layers"))
    with telling("frozen layers", pool.need, pool.size):
        yield from encoded(pool, PortionEncoder, made_of, missing)

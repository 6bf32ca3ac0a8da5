"""The outputs of frozen layers with a pool of encoders on Ray Data.

Workers read the text from their node's catalogue, so only numbers of portions travel there, and
states travel back to the process that writes the file.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from karma_ray.cluster.accelerators import device_here, encoders
from karma_ray.cluster.session import connect
from karma_ray.cluster.waiting import telling, topic_of
from karma_ray.model.frozen_states import KINDS
from karma_ray.runs.frozen_outputs import FrozenOutputs


class PortionEncoder:
    """One actor: the frozen layers of a run's item encoder, and the catalogue's tokens."""

    def __init__(self, outputs: FrozenOutputs, topic: str = "") -> None:
        torch.set_num_threads(1)
        # Without a topic this is no worker that Ray has given a device.
        self.portions = outputs.portions(device_here(topic) if topic else None)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Numbers of portions -> the states of each, as bytes."""
        numbers = batch.column("item").to_pylist()
        states = [self.portions.portion(number).tobytes() for number in numbers]
        return pa.table({"number": numbers, "states": pa.array(states, pa.binary())})


def encode_on_ray(
    outputs: FrozenOutputs, width: int, missing: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Compute portions on all GPUs that the cluster has or may add, or else on its CPUs."""
    connect()
    pool = encoders("computing the outputs of frozen layers", len(missing))
    encoded = ray.data.from_items(missing, override_num_blocks=max(1, len(missing))).map_batches(
        PortionEncoder,
        fn_constructor_args=(outputs, topic_of("frozen layers")),
        batch_size=1,
        batch_format="pyarrow",
        **pool.options,
    )
    with telling("frozen layers", pool.need, pool.size):
        for row in encoded.iter_rows():
            states = np.frombuffer(row["states"], KINDS[outputs.precision])
            yield int(row["number"]), states.reshape(-1, width)

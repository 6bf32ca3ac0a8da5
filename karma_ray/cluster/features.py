"""Visual features of item images, computed by a pool of encoders on Ray Data."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from karma_ray.artifacts import exists
from karma_ray.cluster.accelerators import BASE_MEMORY, device_here, encoders, memory_for
from karma_ray.cluster.session import connect, joins_a_cluster
from karma_ray.cluster.waiting import telling, topic_of
from karma_ray.data.fragments import Fragment
from karma_ray.data.pictures import Part, encode_fragment
from karma_ray.data.work_folder import WorkFolder
from karma_ray.errors import InputError
from karma_ray.runs import features
from karma_ray.runs.features import FeaturesConfig, Fitted, Loaded, encode_here, rows_of

LOG = logging.getLogger(__name__)


def make_features(
    data: str, config: FeaturesConfig, out: str | None = None, num_actors: int | None = None
) -> dict[str, Any]:
    """Call `karma_ray.runs.features.make_features` with `num_actors` encoders.

    Without `num_actors` there are as many encoders as GPUs that the cluster has or may add, or else
    as cores, but never more than there are row groups to encode; one that needs no GPU of the
    cluster is this process. Raises InputError as it does, on a number of actors below 1, and if
    there can never be so many encoders.
    """
    if num_actors is not None and num_actors < 1:
        raise InputError("--actors", num_actors, "must be at least 1")
    return features.make_features(data, config, out, partial(encode_on_ray, num_actors=num_actors))


class FeatureEncoder:
    """An actor with an encoder and the kind of each row of items/."""

    def __init__(
        self, make: Fitted | Loaded, items: str, kinds: ray.ObjectRef, work: WorkFolder,
        topic: str,
    ) -> None:  # fmt: skip
        torch.set_num_threads(1)
        device_here(topic)  # tells the driver if the GPU is one in name only
        self.encoder, self.items, self.work = make(), items, work
        self.kinds = ray.get(kinds)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encode one row group, given by its reference, and return its part as JSON."""
        (described,) = batch.to_pylist()
        fragment = Fragment(**described)
        part = encode_fragment(
            fragment, self.items, rows_of(fragment, self.kinds), self.encoder, self.work
        )
        return pa.table({"part": [json.dumps(asdict(part))]})


def is_enough(num_actors: int | None, num_fragments: int, uses_gpu: bool) -> bool:
    """Whether this process encodes: told to do it alone, or for one row group without a choice.

    A cluster that it joins may have a GPU for an encoder that uses one.
    """
    if num_actors is not None:
        return num_actors == 1
    elsewhere = uses_gpu and joins_a_cluster() and not torch.cuda.is_available()
    return num_fragments == 1 and not elsewhere


def encode_on_ray(
    make: Fitted | Loaded, fragments: list[Fragment], items: str, kinds: np.ndarray,
    work: WorkFolder, num_actors: int | None = None,
) -> Iterator[Part]:  # fmt: skip
    """Encode the row groups with a pool of actors, or in this process if one is enough."""
    if num_actors is not None and num_actors > len(fragments):
        LOG.info("encoding images with %d encoders instead of %d: items/ has %d row groups to do",
                 len(fragments), num_actors, len(fragments))  # fmt: skip
        num_actors = len(fragments)
    if is_enough(num_actors, len(fragments), make.uses_gpu):
        yield from encode_here(make, fragments, items, kinds, work)
        return
    connect()
    pool = encoders(
        "encoding images", len(fragments), num_actors, memory=_memory(make), on_gpus=make.uses_gpu
    )
    described = [asdict(fragment) for fragment in fragments]
    encoded = ray.data.from_items(described, override_num_blocks=len(described)).map_batches(
        FeatureEncoder,
        fn_constructor_args=(make, items, ray.put(kinds), work, topic_of("encoding images")),
        batch_size=1,
        batch_format="pyarrow",
        **pool.options,
    )
    with telling("encoding images", pool.need, pool.size):
        for row in encoded.iter_rows():
            yield Part(**json.loads(row["part"]))


def _memory(make: Fitted | Loaded) -> int:
    if isinstance(make, Loaded) and exists(make.checkpoint):
        return memory_for(make.checkpoint)
    return BASE_MEMORY  # a name of the hub does not say how large it is

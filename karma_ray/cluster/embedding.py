"""Embedding of the catalogue on Ray Data, by a pool of encoders over ranges of rows.

Workers read texts from the node's memory-mapped catalogue and write their parts themselves, so only
row numbers are sent to them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data
import torch

from karma_ray.cluster.accelerators import GPU, device_here, encoders, memory_for
from karma_ray.cluster.session import connect
from karma_ray.cluster.supply import supply
from karma_ray.cluster.waiting import telling, topic_of
from karma_ray.data.work_folder import Part
from karma_ray.errors import InputError
from karma_ray.model.device import cpu_computes_bfloat16, may_use_gpus
from karma_ray.retrieval.embedding import PART_ITEMS, embed_catalog, known_precision
from karma_ray.retrieval.part_encoder import Embedding, PartEncoder


class EmbeddingActor:
    """An actor with a bundle's item encoder and the node's catalogue."""

    def __init__(self, of: Embedding, topic: str) -> None:
        torch.set_num_threads(1)
        self.encode = PartEncoder(of, device_here(topic))

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encode one part, write it, and return its facts as JSON."""
        (described,) = batch.to_pylist()
        return pa.table({"facts": [json.dumps(self.encode(Part(**described)))]})


def embed_items(
    bundle: str, data: str, out: str, num_actors: int | None = None,
    precision: str = "float32", *, reuse: Sequence[str] = (), part_items: int = PART_ITEMS,
) -> dict[str, Any]:  # fmt: skip
    """Call `embed_catalog` with a pool of encoders.

    Without `num_actors` there are as many encoders as GPUs that the cluster has or may add, or else
    as cores, but never more than there are parts to encode. The precision `auto` is
    that of the newest embeddings of the bundle, so that they can be used again; without any it is
    bfloat16 on GPUs and on CPUs with instructions for it (this machine's CPU tells for all), and
    else float32. Raises InputError as it does, and if there can never be so many encoders.
    """
    if num_actors is not None and num_actors < 1:
        raise InputError("--actors", num_actors, "must be at least 1")
    if precision == "auto":
        precision = known_precision(bundle, reuse) or _precision()
    return embed_catalog(
        bundle, data, out, partial(encode_on_ray, num_actors=num_actors), precision=precision,
        reuse=reuse, fewest=num_actors or 1, part_items=part_items,
    )  # fmt: skip


def encode_on_ray(
    of: Embedding, parts: list[Part], num_actors: int | None = None
) -> Iterator[dict[str, Any]]:
    """Encode parts with `num_actors` encoders, or as many as there is room for."""
    connect()
    asked = None if num_actors is None else min(num_actors, len(parts))
    purpose, memory = f"embedding {_num_items(parts)} items", memory_for(of.bundle)
    pool = encoders(purpose, len(parts), asked, memory=memory)
    # Of items, whose blocks are made here: `range` makes its blocks by tasks that wait for CPUs.
    described = [asdict(part) for part in parts]
    encoded = ray.data.from_items(described, override_num_blocks=len(described)).map_batches(
        EmbeddingActor,
        fn_constructor_args=(of, topic_of("embedding")),
        batch_size=1,
        batch_format="pyarrow",
        **pool.options,
    )
    with telling("embedding", pool.need, pool.size):
        for row in encoded.iter_rows():
            yield json.loads(row["facts"])


def _precision() -> str:
    connect()
    on_gpus = may_use_gpus() and supply().reach(GPU).possible
    return "bfloat16" if on_gpus or cpu_computes_bfloat16() else "float32"


def _num_items(parts: list[Part]) -> int:
    return sum(part.end - part.first for part in parts)

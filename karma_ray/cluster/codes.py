"""Semantic ids of a large catalogue on Ray Data, by a pool of workers over ranges of rows.

Workers map the node's copy of the embeddings and write their parts, so only row numbers are sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data

from karma_ray.artifacts import read_manifest
from karma_ray.cluster.accelerators import encoders
from karma_ray.cluster.session import connect
from karma_ray.cluster.waiting import telling
from karma_ray.codes.config import CodesConfig
from karma_ray.codes.table import PART_ITEMS, Coding, PartCoder, assign_here, code_catalog
from karma_ray.data.work_folder import Part
from karma_ray.errors import InputError

HERE_ITEMS = 2_000_000
"""Up to so many items one process is done sooner than Ray has started."""
PURPOSE = "codes"


class CodesActor:
    """An actor with codebooks and the node's embeddings."""

    def __init__(self, of: Coding) -> None:
        self.assign = PartCoder(of)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Assign codes to one part, write it, and return its facts as JSON."""
        (described,) = batch.to_pylist()
        return pa.table({"facts": [json.dumps(self.assign(Part(**described)))]})


def code_items(
    embeddings: str, out: str, config: CodesConfig, codebooks: str | None = None,
    num_actors: int | None = None, part_items: int = PART_ITEMS,
) -> dict[str, Any]:  # fmt: skip
    """Call `code_catalog` in this process for small catalogues, or else with a pool of workers.

    Without `num_actors` there are as many workers as cores. Raises InputError as it does, and if
    there can never be so many workers.
    """
    if num_actors is not None and num_actors < 1:
        raise InputError("--actors", num_actors, "must be at least 1")
    num_items = read_manifest(embeddings, "item_embeddings")["num_items"]
    here = num_actors is None and num_items <= HERE_ITEMS
    assign = assign_here if here else partial(assign_on_ray, num_actors=num_actors)
    return code_catalog(
        embeddings, out, config, codebooks=codebooks, assign=assign, part_items=part_items
    )


def assign_on_ray(
    of: Coding, parts: list[Part], num_actors: int | None = None
) -> Iterator[dict[str, Any]]:
    """Assign parts with `num_actors` workers, or as many as there is room for."""
    connect()
    asked = None if num_actors is None else min(num_actors, len(parts))
    pool = encoders(PURPOSE, len(parts), asked, on_gpus=False)
    described = [asdict(part) for part in parts]
    assigned = ray.data.from_items(described, override_num_blocks=len(described)).map_batches(
        CodesActor,
        fn_constructor_args=(of,),
        batch_size=1,
        batch_format="pyarrow",
        **pool.options,
    )
    with telling(PURPOSE, pool.need, pool.size):
        for row in assigned.iter_rows():
            yield json.loads(row["facts"])

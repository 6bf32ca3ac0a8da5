"""Near-duplicates of the catalogue, which are no negatives of each other (method 1.5).

They are found once, before joint training, among the embeddings that it starts with. Those of
training are never asked: once they become parallel, a mask on their cosine would remove all
negatives and the loss would fall to 0. Masks, pools and click shares then see one content id for
every group of near-duplicates, as they do for items of equal text.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from karma_ray.artifacts import exists, join, locked, value_hash, write_manifest, write_table
from karma_ray.model.device import this_device
from karma_ray.objectives.negatives import grouped_contents
from karma_ray.retrieval.encode import encode_catalog
from karma_ray.runs.stages import Stage
from karma_ray.runs.warm_up import warmup_key

LOG = logging.getLogger(__name__)
VERSION = 1
"""Raised when the code groups otherwise: earlier tables are not found."""
LARGEST_SHARE = 0.1
"""Share of the catalogue above which a group says that the embeddings tell nothing apart."""


def with_near_duplicates(stage: Stage, items_hash: str, cache: str) -> Stage:
    """Return the stage with the table of its near-duplicates in `cache`, made unless it is there.

    The table depends on all that the weights depend on which joint training starts with.
    """
    config = stage.config
    cosine = config.objective.duplicate_cosine
    if cosine >= 1:
        return stage
    key = {
        "version": VERSION,
        "cosine": cosine,
        "precision": config.training.precision,  # of the states of frozen layers
        "start": warmup_key(config, items_hash, stage.items_uri),
    }
    folder = join(cache, f"near-duplicates-{value_hash(key)}")
    with locked(folder):
        if not exists(join(folder, "manifest.json")):
            _write(stage, cosine, folder)
    return replace(stage, contents=folder)


def _write(stage: Stage, cosine: float, folder: str) -> None:
    equal = stage.catalog().content_ids
    contents = grouped_contents(equal, _embeddings(stage), cosine, this_device())
    largest = int(np.bincount(contents).max())
    # Texts that are cut before they differ, say. Without negatives nothing would be learnt.
    if largest > max(LARGEST_SHARE * len(contents), np.bincount(equal).max()):
        LOG.warning(
            "near-duplicates: %d of %d items would be one group, as their embeddings hardly "
            "differ; only equal texts count", largest, len(contents),
        )  # fmt: skip
        contents = equal
    sizes = np.bincount(contents)
    grouped, joined = int(sizes[sizes > 1].sum()), int(equal.max() + 1 - len(sizes))
    LOG.info(
        "near-duplicates: %d of %d items have some, at most %d; a cosine above %g joins %d "
        "contents of different text", grouped, len(contents), sizes.max() - 1, cosine, joined,
    )  # fmt: skip
    write_table(pa.table({"content": contents}), folder)
    write_manifest(
        folder, "near_duplicates", items=len(contents), grouped=grouped, joined=joined,
        cosine=cosine,
    )  # fmt: skip


def _embeddings(stage: Stage) -> NDArray[np.float32]:  # -> [I, D]
    """Encode the catalogue with the weights that joint training starts with."""
    with torch.random.fork_rng():  # a run draws the same numbers whether the table exists
        interest = stage.build_joint().interest
    tokens = stage.collator().catalog_tokens()
    # In float32, as whitening enlarges what rounding to bfloat16 changes.
    return encode_catalog(interest.to(this_device()), *tokens)

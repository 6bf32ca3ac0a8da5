"""Embedding of the catalogue on Ray Data, by a pool of encoders over ranges of rows.

Workers read texts from the node's memory-mapped catalogue, so only row numbers are sent to them.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem

from karma_ray.artifacts import absolute, exists, join, open_filesystem, read_manifest
from karma_ray.cluster.session import connect
from karma_ray.data.catalog import Catalog
from karma_ray.data.prompts import encode_texts
from karma_ray.errors import InputError
from karma_ray.model.device import this_device
from karma_ray.node_cache import known_hash
from karma_ray.retrieval.encode import embedding_rows, encode_catalog, write_embedding_manifest
from karma_ray.retrieval.export import load_bundle

LOG = logging.getLogger(__name__)

BLOCK_BATCHES = 16
"""Encoder batches per Ray batch: enough items to sort by length and need little padding."""


class CatalogEncoder:
    """An actor with a bundle's item encoder and the node's catalogue."""

    def __init__(self, bundle: str, data: str, batch_size: int, precision: str) -> None:
        torch.set_num_threads(1)
        self.bundle = load_bundle(bundle)
        self.catalog = Catalog.load(data)
        self.bundle.interest.to(this_device())
        self.bundle.interest.attach_catalog(self.catalog, data)
        self.batch_size, self.precision = batch_size, precision

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> pa.Table:
        """Encode row numbers {"id": [n]} into `item_embeddings` rows."""
        part = Catalog(self.catalog.table.take(pa.array(batch["id"])))
        config = self.bundle.collate_config
        tokens, lengths = encode_texts(self.bundle.tokenizer, part.texts(), config.max_item_tokens)
        vectors = encode_catalog(
            self.bundle.interest, tokens, lengths, self.batch_size, self.precision, batch["id"]
        )
        return embedding_rows(part.item_ids, part.titles, vectors)


def embed_items(
    bundle: str,
    data: str,
    out: str,
    num_actors: int = 1,
    batch_size: int = 256,
    precision: str = "float32",
) -> dict[str, Any]:
    """Embed every item of `data` with a bundle and write `out`; returns its manifest.

    `out` is replaced. Its manifest is written last, so an interrupted job leaves no folder that
    looks complete. Raises InputError on a missing bundle or catalogue.
    """
    for name, value in (("--actors", num_actors), ("--batch", batch_size)):
        if value < 1:
            raise InputError(name, value, "must be at least 1")
    if not exists(join(data, "items")):
        raise InputError("--data", data, "has no folder items/")
    manifest = read_manifest(bundle, "bundle")
    catalog = Catalog.load(data)
    bundle, data = absolute(bundle), absolute(data)
    connect()
    block = batch_size * BLOCK_BATCHES
    num_blocks = max(num_actors, -(-catalog.num_items // block))
    embedded = ray.data.range(catalog.num_items, override_num_blocks=num_blocks).map_batches(
        CatalogEncoder,
        fn_constructor_args=(bundle, data, batch_size, precision),
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_gpus=min(1.0, ray.cluster_resources().get("GPU", 0.0) / num_actors),
        batch_size=block,
    )
    fs, path = open_filesystem(absolute(out))
    if fs.exists(path):
        fs.rm(path, recursive=True)
    fs.makedirs(path, exist_ok=True)
    LOG.info("embedding %d items with %d encoder(s)", catalog.num_items, num_actors)
    embedded.write_parquet(path, filesystem=PyFileSystem(FSSpecHandler(fs)), compression="zstd")
    parents = {"bundle": manifest["content_hash"], "items": known_hash(join(data, "items"))}
    return write_embedding_manifest(out, parents, catalog.num_items, manifest["width"])

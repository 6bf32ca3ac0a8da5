"""Embedding of the catalogue on Ray Data, by a pool of encoders over ranges of rows.

Workers read texts from the node's memory-mapped catalogue, so only row numbers are sent to them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem

from karma_ray.artifacts import absolute, exists, join, open_filesystem, read_manifest
from karma_ray.cluster.accelerators import WRITER_CPUS, device_here, encoders
from karma_ray.cluster.session import connect
from karma_ray.cluster.waiting import telling, topic_of
from karma_ray.data.catalog import Catalog
from karma_ray.data.prompts import encode_texts
from karma_ray.errors import InputError
from karma_ray.model.device import this_device
from karma_ray.node_cache import known_hash
from karma_ray.retrieval.encode import embedding_rows, encode_catalog, write_embedding_manifest
from karma_ray.retrieval.export import load_bundle

BLOCK_BATCHES = 16
"""Encoder batches per Ray batch: enough items to sort by length and need little padding."""
BASE_MEMORY = 1 << 30
"""Bytes that an encoder needs beside its weights, roughly: libraries, texts and activations."""


class CatalogEncoder:
    """An actor with a bundle's item encoder and the node's catalogue."""

    def __init__(
        self, bundle: str, data: str, batch_size: int, precision: str, topic: str = ""
    ) -> None:
        torch.set_num_threads(1)
        self.bundle = load_bundle(bundle)
        self.catalog = Catalog.load(data)
        self.has_categories = self.catalog.categories is not None
        # Without a topic this is no worker that Ray has given a device.
        self.bundle.interest.to(device_here(topic) if topic else this_device())
        self.bundle.interest.attach_catalog(self.catalog, data)
        self.batch_size, self.precision = batch_size, precision

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> pa.Table:
        """Encode the range {"first": [1], "end": [1]} into `item_embeddings` rows."""
        return self.encode(np.arange(batch["first"][0], batch["end"][0]))

    def encode(self, rows: np.ndarray[Any, Any]) -> pa.Table:
        """Encode rows of the catalogue [n] into `item_embeddings` rows."""
        part = Catalog(self.catalog.table.take(pa.array(rows)))
        config = self.bundle.collate_config
        tokens, lengths = encode_texts(self.bundle.tokenizer, part.texts(), config.max_item_tokens)
        vectors = encode_catalog(
            self.bundle.interest, tokens, lengths, self.batch_size, self.precision, rows
        )
        # All files have the column if any has it, also where no item of a part has a category.
        categories = part.column("category") if self.has_categories else None
        return embedding_rows(part.item_ids, part.titles, vectors, categories)


def embed_items(
    bundle: str,
    data: str,
    out: str,
    num_actors: int | None = None,
    batch_size: int = 256,
    precision: str = "float32",
) -> dict[str, Any]:
    """Embed every item of `data` with a bundle and write `out`; returns its manifest.

    Without `num_actors` there are as many encoders as GPUs that the cluster has or may add, or else
    as cores, but never more than the catalogue has blocks. `out` is replaced. Its manifest is
    written last, so an interrupted job leaves no folder that looks complete. Raises InputError on a
    missing bundle or catalogue, or if there can never be so many encoders.
    """
    for name, value in (("--actors", num_actors), ("--batch", batch_size)):
        if value is not None and value < 1:
            raise InputError(name, value, "must be at least 1")
    if not exists(join(data, "items")):
        raise InputError("--data", data, "has no folder items/")
    manifest = read_manifest(bundle, "bundle")
    catalog = Catalog.load(data)
    bundle, data = absolute(bundle), absolute(data)
    connect()
    blocks = _ranges(catalog.num_items, num_actors or 1, batch_size * BLOCK_BATCHES)
    memory = BASE_MEMORY + 2 * _bytes_of(bundle)  # weights, and a copy while they are loaded
    pool = encoders(f"embedding {catalog.num_items} items", len(blocks), num_actors, memory=memory)
    # Of items, whose blocks are made here: `range` makes its blocks by tasks that wait for CPUs.
    embedded = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
        CatalogEncoder,
        fn_constructor_args=(bundle, data, batch_size, precision, topic_of("embedding")),
        batch_size=1,
        **pool.options,
    )
    fs, path = open_filesystem(absolute(out))
    if fs.exists(path):
        fs.rm(path, recursive=True)
    fs.makedirs(path, exist_ok=True)
    with telling("embedding", pool.need, pool.size):
        embedded.write_parquet(
            path, filesystem=PyFileSystem(FSSpecHandler(fs)), compression="zstd",
            ray_remote_args={"num_cpus": WRITER_CPUS},
        )  # fmt: skip
    parents = {"bundle": manifest["content_hash"], "items": known_hash(join(data, "items"))}
    return write_embedding_manifest(out, parents, catalog.num_items, manifest["width"])


def _ranges(num_items: int, fewest: int, most_rows: int) -> list[dict[str, int]]:
    """Cut the rows into at least `fewest` ranges of about equal size, at most `most_rows` each."""
    count = max(1, min(num_items, max(fewest, -(-num_items // most_rows))))
    edges = [num_items * n // count for n in range(count + 1)]
    return [{"first": a, "end": b} for a, b in pairwise(edges)]


def _bytes_of(folder: str) -> int:
    """Return the size of a folder's files."""
    fs, path = open_filesystem(folder)
    return int(fs.du(path))

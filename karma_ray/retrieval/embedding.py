"""Embeddings of a whole catalogue, in parts that an interrupted job finds again.

A part holds the items of a range of rows and is named by what they say, so a part stands as long
as its items stay. Vectors of items whose text is known from earlier embeddings, or from parts of
an interrupted job, are used again; only the others are encoded.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from karma_ray.artifacts import (
    absolute,
    exists,
    locked,
    read_manifest,
    read_table,
)
from karma_ray.data.catalog import Catalog
from karma_ray.data.fragments import items_folder
from karma_ray.data.progress import told
from karma_ray.data.work_folder import Part, WorkFolder
from karma_ray.errors import InputError
from karma_ray.node_cache import known_hash
from karma_ray.retrieval.encode import MANIFEST_KIND, write_embedding_manifest
from karma_ray.retrieval.export import load_bundle
from karma_ray.retrieval.known_vectors import has_hashes
from karma_ray.retrieval.part_encoder import Contents, Embedding, PartEncoder, encode_here

LOG = logging.getLogger(__name__)
VERSION = 1
"""Raised when the code computes other vectors from the same items: earlier ones are not reused."""
PART_ITEMS = 4096
"""Items of a part: enough to sort by length, and little is lost with an encoder that dies."""
LEAST_COSINE = 0.99
"""Cosine between vectors of bfloat16 and of float32 below which a job warns."""

EncodeParts = Callable[[Embedding, list[Part]], Iterable[dict[str, Any]]]
"""(what encoders have to know, parts) -> the facts of each part, which is then finished."""


def embed_catalog(
    bundle: str, data: str, out: str, encode: EncodeParts = encode_here, *,
    precision: str = "float32", reuse: Sequence[str] = (), fewest: int = 1,
    part_items: int = PART_ITEMS,
) -> dict[str, Any]:  # fmt: skip
    """Embed every item of `data` with a bundle and write `out`; returns its manifest.

    There are at least `fewest` parts, if the catalogue is large enough. `out` is replaced when all
    of them are there. Vectors of the folders `reuse`, of which the first is the newest, are used
    again if they were made by the same bundle in the same way. Raises InputError on a missing
    bundle or catalogue.
    """
    bundle, data, out = absolute(bundle), absolute(data), absolute(out)
    items = items_folder(data)
    if not exists(items):
        raise InputError(
            "items", data, "has no folder items/ and is none: it holds no .parquet file"
        )
    made_by = read_manifest(bundle, "bundle")
    made = made_with(precision)
    catalog = Catalog.load(data)
    parents = {"bundle": made_by["content_hash"], "items": known_hash(items)}
    contents = Contents.of(bundle, catalog, data)
    if contents.is_of_ids:
        load_bundle(bundle).interest.attach_catalog(catalog, data)  # refuses other items
    parts = plan_of(catalog, contents, fewest, part_items)
    work, names = WorkFolder(out), {part.name for part in parts}
    with locked(out):
        work.open([made, parents["bundle"]])
        aside = work.keep(names)
        sources = [folder for folder in reuse if _fits(folder, parents["bundle"], made)]
        known = (*([aside] if aside else []), *sources)
        done = work.finished()
        if done:
            LOG.info("embedding: %d of %d parts already exist", len(done), len(parts))
        missing = [part for part in parts if part.name not in done]
        facts = list(done.values())
        if missing:
            of = Embedding(bundle, data, precision, work, known)
            if known and all(map(PartEncoder(of).knows, missing)):
                encode = encode_here  # which loads no model, as nothing has to be encoded
            made_now = encode(of, missing)
            total = sum(part.end - part.first for part in missing)
            facts += told(made_now, lambda f: f["encoded"] + f["reused"], total, "embedding")
        work.keep(names)
        counts = summary(facts) | {"dropped": _num_gone(sources[0], catalog) if sources else 0}
        if sources and "accuracy" in (before := read_manifest(sources[0], MANIFEST_KIND)):
            counts = {"accuracy": before["accuracy"], **counts}  # if it was not measured again
        manifest = write_embedding_manifest(
            work.table, parents, catalog.num_items, made_by["width"], made=made, **counts
        )
        work.complete()
    return manifest


def plan_of(
    catalog: Catalog, contents: Contents, fewest: int = 1, most_items: int = PART_ITEMS
) -> list[Part]:
    """Cut the rows into at least `fewest` parts of about equal size, at most `most_items` each."""
    num_items = catalog.num_items
    count = max(1, min(num_items, max(fewest, -(-num_items // most_items))))
    edges = [num_items * n // count for n in range(count + 1)]
    has_categories, parts = catalog.has_categories, []
    for first, end in pairwise(edges):
        items = Catalog(catalog.table.slice(first, end - first))
        digest = hashlib.sha256(contents.hashes(items, first).tobytes())
        categories = items.column("category") if has_categories else None
        for column in (items.item_ids, items.titles, categories or []):
            digest.update("\0".join(value or "" for value in column).encode() + b"\0")
        parts.append(Part(first, end, f"part-{first:012d}-{digest.hexdigest()[:16]}"))
    return parts


def summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return counts of all parts, and the share of the slots of all batches that was padding."""
    names = ("encoded", "reused", "tokens", "slots")
    count = {name: sum(part.get(name, 0) for part in parts) for name in names}
    padding = 1 - count["tokens"] / count["slots"] if count["slots"] else 0.0
    found: dict[str, Any] = {
        "encoded": count["encoded"], "reused": count["reused"], "padding_share": round(padding, 4)
    }  # fmt: skip
    for accuracy in (part["accuracy"] for part in parts if "accuracy" in part):
        found["accuracy"] = accuracy
        level = logging.INFO if accuracy["min_cosine"] >= LEAST_COSINE else logging.WARNING
        LOG.log(level, "bfloat16 against float32 on %d items: cosine %.5f on average, %.5f at "
                "least", *accuracy.values())  # fmt: skip
    return found


def made_with(precision: str) -> dict[str, Any]:
    """Return what a manifest says of how the vectors were made, beside the bundle."""
    return {"version": VERSION, "precision": precision}


def known_precision(bundle: str, folders: Sequence[str]) -> str | None:
    """Return the precision of the first of these embeddings that a bundle's encoders made."""
    wanted = read_manifest(bundle, "bundle")["content_hash"]
    for folder in folders:
        facts = read_manifest(folder, MANIFEST_KIND)
        if "made" in facts and facts["parents"].get("bundle") == wanted:
            return str(facts["made"]["precision"])
    return None


def _fits(folder: str, bundle_hash: str, made: dict[str, Any]) -> bool:
    """Whether a bundle makes the vectors of a folder anew if it encodes the same items again."""
    facts = read_manifest(folder, MANIFEST_KIND)
    same = facts["parents"].get("bundle") == bundle_hash and facts.get("made") == made
    return same and has_hashes(folder)


def _num_gone(folder: str, catalog: Catalog) -> int:
    """Return how many items of earlier embeddings the catalogue has no more."""
    ids = read_table(folder, ["item_id"]).column("item_id")
    return sum(int((catalog.rows(some) < 0).sum()) for some in ids.chunks)

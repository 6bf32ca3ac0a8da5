"""Aligned embeddings of a run, RUN/aligned_embeddings: its embeddings after item alignment."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from karma_ray.artifacts import RunFolder, read_manifest
from karma_ray.codes.alignment import AlignmentConfig, align
from karma_ray.codes.pairs import COLUMNS, co_clicks, relevant, text_similarity
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError
from karma_ray.retrieval.encode import load_embeddings, save_embeddings
from karma_ray.retrieval.parts import served

FOLDER = "aligned_embeddings"


def align_run(
    run: str, data: str | None = None, config: AlignmentConfig | None = None
) -> dict[str, Any]:
    """Align the embeddings of `run` with the co-clicks of its training data; returns the manifest.

    Raises InputError if the data cannot be had or have too few related pairs, and SkewError if
    their catalogue is another one.
    """
    config = config or AlignmentConfig()
    data = data or read_manifest(run).get("data")
    if not data:
        raise InputError("--data", data, f"is needed: {run} does not name its data")
    prepared = PreparedData.load(data)
    catalog = prepared.catalog()
    source = served(run).item_embeddings
    table = load_embeddings(source).in_order(catalog.item_ids)
    pairs = co_clicks(prepared.windows(*COLUMNS), catalog, config.gap_s)
    related = relevant(pairs, text_similarity(catalog), config.relevance)
    found = align(table.embeddings, related, config)
    parents = {**table.parents, "embeddings": read_manifest(source)["content_hash"]}
    aligned = replace(table, embeddings=found.apply(table.embeddings), parents=parents)
    facts = {
        "config": asdict(config), "co_click_pairs": len(pairs), "related_pairs": len(related),
        "trained_on": found.trained_on, "held_out": found.held_out,
        "pair_recall_before": round(found.recall_before, 6),
        "pair_recall_after": round(found.recall_after, 6),
    }  # fmt: skip
    return save_embeddings(aligned, RunFolder(run).path(FOLDER), **facts)

"""Aligned embeddings of a run, RUN/aligned_embeddings: its embeddings after item alignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

from karma_ray.artifacts import RunFolder, exists, locked, read_manifest, remove, value_hash
from karma_ray.codes.alignment import AlignmentConfig, align
from karma_ray.codes.pairs import COLUMNS, co_clicks, relevant, text_similarity
from karma_ray.codes.tuning import TuningConfig
from karma_ray.data.catalog import Catalog
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError
from karma_ray.retrieval.aligned_llm import tuned_vectors
from karma_ray.retrieval.encode import ItemTable, load_embeddings, save_embeddings
from karma_ray.retrieval.parts import served

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from karma_ray.codes.pairs import Pairs

FOLDER = "aligned_embeddings"
VERSION = 1
"""Raised when the code makes other vectors of the same inputs, so that finished ones are not
reused."""
Method = Literal["projection", "llm"]
METHODS: Mapping[Method, type[AlignmentConfig] | type[TuningConfig]] = {
    "projection": AlignmentConfig, "llm": TuningConfig,
}  # fmt: skip
"""A projection over frozen embeddings, or fine-tuning of the LLM: the configuration says which."""
FOLDERS = (FOLDER, *(f"{FOLDER}-{method}" for method in METHODS))
"""Where a run has them, and where a comparison keeps those of each method."""


def align_run(
    run: str, data: str | None = None, config: AlignmentConfig | TuningConfig | None = None,
    out: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Align the embeddings of `run` with the co-clicks of its training data; returns the manifest.

    Finished ones of the same embeddings, data and configuration are used again. Raises InputError
    if the data cannot be had or have too few related pairs, or the run has no LLM to tune, and
    SkewError if their catalogue is another one.
    """
    config = config or AlignmentConfig()
    config.check()
    data = data or read_manifest(run).get("data")
    if not data:
        raise InputError("--data", data, f"is needed: {run} does not name its data")
    prepared, out = PreparedData.load(data), out or RunFolder(run).path(FOLDER)
    source = served(run).item_embeddings
    made_of = read_manifest(source)
    parents = {**made_of["parents"], "embeddings": made_of["content_hash"]}
    made = {
        "version": VERSION, "method": _method(config), "config": asdict(config),
        "data": value_hash(prepared.facts),
    }  # fmt: skip
    with locked(out):
        known = read_manifest(out) if exists(f"{out}/manifest.json") else {}
        if value_hash([made, parents]) == value_hash(
            [{name: known.get(name) for name in made}, known.get("parents")]
        ):
            return known
        catalog = prepared.catalog()
        table = load_embeddings(source).in_order(catalog.item_ids)
        pairs = co_clicks(prepared.windows(*COLUMNS), catalog, config.gap_s)
        if isinstance(config, TuningConfig):
            vectors, found = tuned_vectors(run, catalog, table, pairs, config)
        else:
            vectors, found = _projected(catalog, table, pairs, config)
        aligned = replace(table, embeddings=vectors, parents=parents)
        remove(out)  # so that a manifest never stands beside the vectors of another
        return save_embeddings(aligned, out, **made, co_click_pairs=len(pairs), **found)


def _method(config: AlignmentConfig | TuningConfig) -> Method:
    return "llm" if isinstance(config, TuningConfig) else "projection"


def _projected(
    catalog: Catalog, table: ItemTable, pairs: Pairs, config: AlignmentConfig
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Return the projected vectors [I, D] and facts."""
    related = relevant(pairs, text_similarity(catalog), config.relevance)
    found = align(table.embeddings, related, config)
    return found.apply(table.embeddings), {
        "relevance": {"by": "texts", "least": config.relevance},
        "asked_pairs": len(pairs), "related_pairs": len(related),
        "trained_on": found.trained_on, "held_out": found.held_out,
        "pair_recall_before": round(found.recall_before, 6),
        "pair_recall_after": round(found.recall_after, 6),
    }  # fmt: skip

"""Exposures of prepared data, derived once from its events and kept in the cache.

They are made as `prepare` makes its tables (runs/preparation.py): parts of the log are checked,
then partitions of users are built, each by a task in this process or on Ray; a job that was killed
goes on. The name of the folder is the hash of all that it depends on.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from karma_ray.artifacts import (
    absolute,
    data_files,
    exists,
    join,
    locked,
    move,
    open_filesystem,
    read_manifest,
    remove,
    value_hash,
    write_manifest,
)
from karma_ray.config import from_dict
from karma_ray.data.config import PrepareConfig
from karma_ray.data.prepare_work import PrepareWork
from karma_ray.data.prepared import PreparedData
from karma_ray.data.splits import Cutoffs, to_microseconds
from karma_ray.data.tasks import RunTasks, run_here
from karma_ray.data.work_folder import open_work
from karma_ray.errors import InputError
from karma_ray.node_cache import known_hash
from karma_ray.ranking.exposures import KIND, SPLITS, ExposureBuild, Exposures
from karma_ray.ranking.features import num_features
from karma_ray.ranking.vectors import FeatureBuild, vectors_of
from karma_ray.retrieval.parts import served
from karma_ray.retrieval.retriever import check_run

LOG = logging.getLogger(__name__)
VERSION = 2
"""Raised when the code makes other exposures of the same log."""
SMALL_PAGES = 1 << 18
"""Pages whose features this process computes itself, as starting Ray would take longer."""


def ensure_exposures(
    source: PreparedData, max_history: int, cache: str, run: RunTasks = run_here
) -> Exposures:
    """Return the exposures of prepared data, making them first if the cache has none.

    Raises InputError when the log does not say what was shown.
    """
    check_exposed(source)
    items = known_hash(join(source.items_uri, "items"))
    config = _prepared_with(source)
    made_of = {
        "version": VERSION, "input": source.facts.get("input"), "items": items,
        "max_history": max_history, "cutoffs": _cutoffs(source).iso(), "seed": config.seed,
        "hold_out": config.hold_out, "max_user_events": config.max_user_events,
    }  # fmt: skip
    folder = join(cache, f"exposures-{value_hash(made_of)}")
    with locked(folder):
        if not exists(join(folder, "manifest.json")):
            _make(source, config, max_history, folder, run, {"parents": {"items": items}})
    return Exposures.load(folder)


def with_vectors(
    exposures: Exposures, vectors: str, interest: bool, items_uri: str, cache: str,
    run: RunTasks = run_here,
) -> Exposures:  # fmt: skip
    """Return exposures with the features of a run's item vectors, making them if needed.

    Raises InputError when that run is not finished, or has vectors of another catalogue.
    """
    vectors = absolute(vectors)
    check_run(vectors)
    vectors_of(vectors, items_uri)
    made_by = read_manifest(served(vectors).item_embeddings)["content_hash"]
    made_of = [VERSION, exposures.uri.rsplit("/", 1)[-1], made_by, interest]
    folder = join(cache, f"exposures-{value_hash(made_of)}")
    with locked(folder):
        if not exists(join(folder, "manifest.json")):
            LOG.info("exposures: similarities by the vectors of %s", vectors)
            _add_features(exposures, vectors, interest, items_uri, folder, run, made_by)
    return Exposures.load(folder)


def _add_features(
    exposures: Exposures, vectors: str, interest: bool, items_uri: str, folder: str,
    run: RunTasks, made_by: str,
) -> None:  # fmt: skip
    draft = f"{folder}-work"
    open_work(draft, folder)
    done = set(_files(draft))
    files = [file for file in _files(exposures.uri) if file not in done]
    pages = sum(exposures.num_pages(split) for split in SPLITS)
    build = FeatureBuild(exposures.uri, draft, vectors, items_uri, interest)
    list(run(build, files, pages <= SMALL_PAGES))
    remove(join(draft, "key.json"))
    kept = ("counts", "max_history", "negative_source", "data", "cutoffs")
    write_manifest(
        draft, KIND, parents={**exposures.facts["parents"], "item_embeddings": made_by},
        vectors=vectors, interest=interest, num_features=num_features(interest),
        **{name: exposures.facts[name] for name in kept},
    )  # fmt: skip
    move(draft, folder)


def _files(folder: str) -> list[str]:
    """Return the Parquet files below a folder, by their paths in it."""
    _, root = open_filesystem(folder)
    return [name[len(root) + 1 :] for name in data_files(folder, (".parquet",))]


def check_exposed(source: PreparedData) -> None:
    """Raise InputError on data that hold no exposures."""
    if source.facts.get("negative_source") == "none":
        raise InputError(
            "--data", source.uri, "does not say what was shown and not clicked, which a CTR model "
            "learns from: import the log with its exposed_item_ids, or train a recipe for recall "
            "such as karma_text",
        )  # fmt: skip
    if not exists(join(source.items_uri, "events")):
        raise InputError(
            "--data", source.items_uri, "has no events/, only sequences and examples of clicks; "
            "a CTR model needs the pages themselves",
        )  # fmt: skip


def _prepared_with(source: PreparedData) -> PrepareConfig:
    return from_dict({"prepare": source.facts.get("prepare") or {}}).prepare


def _cutoffs(source: PreparedData) -> Cutoffs:
    names = ("valid_start", "test_start")
    return Cutoffs(*(to_microseconds(source.facts[name], name) for name in names))


def _make(
    source: PreparedData, config: PrepareConfig, max_history: int, folder: str, run: RunTasks,
    facts: dict[str, Any],
) -> None:  # fmt: skip
    from karma_ray.data.event_parts import Sizes, list_parts
    from karma_ray.data.forgotten import Forgotten
    from karma_ray.data.passes import PartCheck
    from karma_ray.data.preparation import catalogue_ids
    from karma_ray.data.staging import read_catalogue
    from karma_ray.data.user_rows import num_partitions

    sizes, work = Sizes(), PrepareWork(f"{folder}-work")
    events, item_ids = join(source.items_uri, "events"), None
    work.open(folder)
    parts = list_parts(events, sizes, work.known_parts())
    work.write_parts(parts)
    item_ids = catalogue_ids(read_catalogue(source.items_uri).table)
    work.match_catalogue(item_ids)
    cells = sum(part.cells for part in parts)
    small, partitions = (
        cells <= sizes.here_cells,
        num_partitions(config.num_partitions, cells, sizes.partition_cells),
    )
    LOG.info("exposures: reading %d event rows", sum(part.num_rows for part in parts))
    check = PartCheck(events, work, item_ids, config, Forgotten.of(source.uri), with_unclicked=True)
    unchecked = [
        part for part, known in zip(parts, work.facts(parts), strict=True) if known is None
    ]
    list(run(check, unchecked, small))
    build = ExposureBuild(
        work, parts, partitions, _cutoffs(source), config, source.items_uri, max_history,
        _held_out(source, config),
    )  # fmt: skip
    work.open_build([folder, partitions])
    done = work.reports()
    list(run(build, [number for number in range(partitions) if number not in done], small))
    counts = _added(report["counts"] for report in work.reports().values())
    for name in ("reports", "key.json"):
        remove(join(work.build, name))
    write_manifest(
        work.build, KIND, counts=counts, max_history=max_history,
        negative_source=source.facts.get("negative_source"), data=source.uri,
        cutoffs=_cutoffs(source).iso(), **facts,
    )  # fmt: skip
    move(work.build, folder)
    work.close()


def _held_out(source: PreparedData, config: PrepareConfig) -> np.ndarray | None:
    return source.held_out(source.catalog()) if config.hold_out else None


def _added(counts: Any) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for of_partition in counts:
        for split, found in of_partition.items():
            for name, count in found.items():
                total[split][name] = total[split].get(name, 0) + count
    return total

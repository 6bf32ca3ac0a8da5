"""The runs that a report compares: finished, of the same data, with vectors of its catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from karma_ray import recipes
from karma_ray.artifacts import RunFolder, absolute, exists, read_json, read_manifest
from karma_ray.config import from_dict
from karma_ray.data.fragments import items_folder
from karma_ray.data.prepared import PreparedData, differences
from karma_ray.errors import InputError
from karma_ray.node_cache import known_hash
from karma_ray.retrieval.parts import delta_of, served
from karma_ray.retrieval.retriever import check_run

KARMA, ACTION_ONLY, NONE = "karma", "action_only", "none"
ARMS = (KARMA, ACTION_ONLY, NONE)


@dataclass(frozen=True)
class OpenedRun:
    """A finished run and what its figures depend on."""

    run: str
    name: str
    arm: str
    """`karma` or `action_only`."""
    recipe: str
    seed: int
    parts: tuple[str, ...]
    """Content hashes of the bundle, the embeddings and the index that serve."""

    @classmethod
    def open(cls, run: str, arm: str, source: PreparedData) -> OpenedRun:
        """Open a run; raises InputError unless it is finished and fits the data."""
        field = "RUN" if arm == KARMA else "--beside"
        path = absolute(run)
        if "://" not in path:
            path = str(Path(path).resolve())  # show the name of the run that `latest` points to
        if not exists(RunFolder(path).config):
            raise InputError(field, run, "is not a run folder: it has no config.json")
        config = from_dict(read_json(RunFolder(path).config))
        recipe = config.recipe
        if recipe in (*recipes.FLOORS, *recipes.CEILINGS):
            message = f"is the floor or ceiling {recipe}, which has no vectors"
            raise InputError(field, run, message)
        check_run(path)
        if not exists(RunFolder(path).path("manifest.json")):
            raise InputError(field, run, "is not finished: it has no manifest.json")
        folder = served(path)
        _check_data(field, run, folder, source)
        made = [folder.bundle, folder.item_embeddings, folder.index, delta_of(folder)]
        hashes = tuple(str(read_manifest(part)["content_hash"]) for part in made if part)
        name = path.rstrip("/").rsplit("/", 1)[-1]
        return cls(path, name, arm, recipe, config.seed, hashes)


def open_runs(
    runs: Sequence[str], arm: str, source: PreparedData, taken: Sequence[str] = ()
) -> list[OpenedRun]:
    """Open the runs of one arm, each once, in the order of their seeds.

    Equal names of folders, also those `taken` by another arm, get a number.
    """
    opened = {one.run: one for one in (OpenedRun.open(run, arm, source) for run in runs)}
    found, names = [], list(taken)
    for one in sorted(opened.values(), key=lambda one: one.seed):
        count = names.count(one.name) + 1
        names.append(one.name)
        found.append(one if count == 1 else replace(one, name=f"{one.name} ({count})"))
    return found


def paired(karma: Sequence[OpenedRun], beside: Sequence[OpenedRun]) -> list[tuple[int, int]]:
    """Return which action-only run every run is compared with: that of its seed.

    If the seeds differ but their number does not, the pairs are in their order. Raises InputError
    if neither fits, and if both sides share a run.
    """
    if shared := {one.run for one in karma} & {one.run for one in beside}:
        raise InputError("--beside", shared.pop(), "is one of the runs that it would be beside")
    if not beside:
        return []
    if len(karma) == len(beside):
        return [(number, number) for number in range(len(karma))]
    seeds = [one.seed for one in beside]
    wanted = [one.seed for one in karma]
    if len(set(seeds)) < len(seeds) or not set(wanted) <= set(seeds):
        message = f"have the seeds {seeds}; name one for each RUN, whose seeds are {wanted}"
        raise InputError("--beside", [one.name for one in beside], message)
    return [(number, seeds.index(seed)) for number, seed in enumerate(wanted)]


def _check_data(field: str, run: str, folder: RunFolder, source: PreparedData) -> None:
    """Raise InputError unless the run's vectors and its training data are those of `source`."""
    items = read_manifest(folder.item_embeddings)["parents"].get("items")
    if items != known_hash(items_folder(source.items_uri)):
        raise InputError(
            field, run, f"has vectors of another catalogue than {source.items_uri}; name its own "
            "data with --data, or embed these items with jobs/embed.py",
        )  # fmt: skip
    trained_on = str(read_manifest(folder.root, "run")["parents"].get("data", ""))
    if trained_on != str(source.facts.get("input", "")):
        raise InputError(
            field, run, f"was trained on other data than {source.uri}: its training may have seen "
            "these test clicks, and runs of different data cannot be compared",
        )  # fmt: skip
    config = from_dict(read_json(folder.config))
    changed = {} if source.facts.get("presplit") else differences(source.facts, config.prepare)
    for name, (there, wanted) in changed.items():
        raise InputError(
            field, run, f"was trained with prepare.{name}={wanted!r}, and {source.uri} is prepared "
            f"with {there!r}: its training may have seen these test clicks",
        )  # fmt: skip

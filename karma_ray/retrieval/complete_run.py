"""Whether a run folder holds all that serving needs, and whether its parts belong together."""

from __future__ import annotations

from karma_ray.artifacts import RunFolder, exists, read_manifest
from karma_ray.errors import InputError
from karma_ray.retrieval.index import check_parent
from karma_ray.retrieval.parts import channels_of, delta_of, served


def check_run(run: str | RunFolder) -> None:
    """Raise InputError or SkewError if a run cannot be served; reads manifests only."""
    folder = served(run)
    run = folder.root
    require_part(run, folder.bundle, "jobs/train.py --out RUN")
    require_part(run, folder.item_embeddings, "jobs/embed.py RUN")
    require_part(run, folder.index, "jobs/index.py RUN")
    bundle = read_manifest(folder.bundle, "bundle")
    embeddings = read_manifest(folder.item_embeddings, "item_embeddings")
    index = read_manifest(folder.index, "index")
    made = bundle["content_hash"]
    check_parent(embeddings["parents"], "bundle", made, folder.item_embeddings)
    check_parent(index["parents"], "bundle", made, folder.index)
    made = embeddings["content_hash"]
    check_parent(index["parents"], "item_embeddings", made, folder.index)
    if exists(f"{channels_of(folder)}/manifest.json"):
        parents = read_manifest(channels_of(folder), "channels")["parents"]
        check_parent(parents, "index", index["content_hash"], channels_of(folder))
    if (delta := delta_of(folder)) is not None:
        parents = read_manifest(delta, "item_embeddings")["parents"]
        check_parent(parents, "index", index["content_hash"], delta)


def require_part(run: str, part: str, command: str) -> None:
    """Raise InputError unless `part` of `run` is complete (its manifest is written last)."""
    require_folder(run)
    if not exists(f"{part}/manifest.json"):
        name = part.rsplit("/", 1)[-1]
        raise InputError("RUN", run, f"has no finished {name}/; `python {command}` makes it")


def require_run(run: str) -> None:
    """Raise InputError unless a folder is that of a run, finished or not."""
    require_folder(run)
    if not exists(RunFolder(run).config):
        raise InputError("RUN", run, "is not a run folder: it has no config.json")


def require_folder(run: str) -> None:
    """Raise InputError unless the folder of a run is there."""
    if not exists(run):
        raise InputError("RUN", run, "does not exist; `python jobs/train.py --out RUN` makes one")

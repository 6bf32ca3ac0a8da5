"""The pointer to what is live: a folder, local or in a store, with one small file `live.json`.

It names each run, the very folders in it, and their content hashes, so that every replica answers
from the same files, also one that starts later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from karma_ray.artifacts import RunFolder, exists, join, open_filesystem, write_json
from karma_ray.errors import InputError
from karma_ray.retrieval.parts import delta_of, served
from karma_ray.retrieval.retriever import check_run
from karma_ray.serving.ranking import check_ranker

FILE = "live.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LiveRun:
    """A run that answers the users of one arm."""

    arm: str
    run: str
    """Path or URI that every replica can read."""
    parts: Mapping[str, str]
    """Names of the folders in the run, where they are not the first ones."""
    model_version: str
    index_version: str
    published_at: str
    share: float = 1.0
    """Share of the users; the first arm answers the rest."""

    @property
    def folder(self) -> RunFolder:
        """The run folder with the very parts that were published."""
        return RunFolder(self.run, self.parts)

    @property
    def engine_key(self) -> str:
        """What an engine depends on."""
        kept = [self.run, dict(self.parts), self.model_version, self.index_version]
        return json.dumps(kept, sort_keys=True)

    @property
    def version(self) -> dict[str, str]:
        """The content hashes that its answers carry."""
        return {"model_version": self.model_version, "index_version": self.index_version}


@dataclass(frozen=True)
class Live:
    """What is live, and what was before."""

    arms: tuple[LiveRun, ...]
    salt: str
    """Hides user ids in logs; it never changes."""
    split: str
    """Names the experiment, for the division of users."""
    previous_arms: tuple[LiveRun, ...] = field(default=())
    previous_split: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the content of `live.json`."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def live_file(folder: str) -> str:
    """Return the path of the pointer in a live folder."""
    return join(folder, FILE)


def is_live_folder(folder: str) -> bool:
    """Whether a folder holds a pointer, and is no run."""
    return exists(live_file(folder))


def live_text(folder: str) -> str:
    """Return the text of the pointer as it is now, past all caches; raises InputError."""
    fs, path = open_filesystem(live_file(folder))
    try:
        return bytes(fs.cat_file(path)).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("live folder", folder, f"has no readable {FILE} ({error})") from None


def parse_live(text: str, folder: str) -> Live:
    """Return what a pointer says; raises InputError when it is damaged."""
    try:
        facts = json.loads(text)
        arms, before = (
            tuple(LiveRun(**arm) for arm in facts[name]) for name in ("arms", "previous_arms")
        )
        live = Live(arms, facts["salt"], facts["split"], before, facts["previous_split"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError("live folder", folder, f"has a damaged {FILE} ({error!r})") from None
    if not live.arms:
        raise InputError("live folder", folder, f"has a damaged {FILE} (it names no run)")
    return live


def read_live(folder: str) -> Live:
    """Return what is live; raises InputError when the pointer is missing or damaged."""
    return parse_live(live_text(folder), folder)


def write_live(live: Live, folder: str) -> None:
    """Replace the pointer: by a rename on a disk, by one put in a store."""
    write_json(live.to_json(), live_file(folder))


def check_source(source: str, ranker: str | None = None) -> RunFolder:
    """Check that a run, or every run that a live folder names, can be served beside `ranker`.

    Returns the folder of the run, or of the first arm. Raises InputError or SkewError.
    """
    folders = [served(source)]
    if is_live_folder(source):
        folders = [usable_folder(arm) for arm in read_live(source).arms]
    for folder in folders:
        check_run(folder)
        if ranker is not None:
            check_ranker(ranker, folder)
    return folders[0]


def usable_folder(arm: LiveRun) -> RunFolder:
    """Return the parts that were published, or those that serve now if the former are gone."""
    published = arm.folder
    needed = [published.item_embeddings, published.index, delta_of(published) or published.index]
    if all(exists(join(part, "manifest.json")) for part in needed):
        return published
    return served(arm.run)

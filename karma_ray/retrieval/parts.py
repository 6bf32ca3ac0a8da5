"""Which folders of a run serve, when its catalogue was embedded or indexed again.

The first embeddings, index and channels of a run are `item_embeddings/`, `index/` and `channels/`.
Later ones are written beside them (`index-2/`, ...), and `current.json` names those that serve, all
together: one small file, replaced at once on any disk or store. Who reads or answers from a run
never meets a part that is being written, nor an index of other embeddings. The parts that served
before stay until the next change.
"""

from __future__ import annotations

import re
from typing import Any

from karma_ray.artifacts import RunFolder, exists, open_filesystem, read_json, remove, write_json
from karma_ray.data.work_folder import WorkFolder

CURRENT = "current.json"
PARTS = ("item_embeddings", "index", "channels", "delta")
_NAMED = re.compile(rf"(?P<part>{'|'.join(PARTS)})(-(?P<number>\d+))?")


def served(run: str | RunFolder) -> RunFolder:
    """Return the run folder with the parts that serve; a RunFolder is returned as it is."""
    if isinstance(run, RunFolder):
        return run
    return RunFolder(run, _state(run).get("current", {}))


def delta_of(folder: RunFolder) -> str | None:
    """Return the folder of what was added to the index since it was made, if there is one."""
    return folder.path(folder.names["delta"]) if folder.names.get("delta") else None


def channels_of(folder: RunFolder) -> str:
    """Return the folder of the channels that were made with the index, if they were."""
    return folder.path(folder.names.get("channels", "channels"))


def to_embed(run: str) -> RunFolder:
    """Return the run folder with a place for new embeddings."""
    return _with_new(served(run), "item_embeddings")


def embedded(run: str) -> list[str]:
    """Return the folders of a run's newest complete embeddings, and of the delta that serves."""
    found = (_NAMED.fullmatch(name) for name in _listed(run))
    names = [
        (int(name["number"] or 1), name[0])
        for name in found
        if name and name["part"] == "item_embeddings"
    ]
    paths = [RunFolder(run).path(name) for _, name in sorted(names, reverse=True)]
    newest = [path for path in paths if exists(f"{path}/manifest.json")][:1]
    delta = delta_of(served(run))
    return [*newest, *([delta] if delta else [])]


def offer(folder: RunFolder) -> None:
    """Let the next index be made from the complete embeddings of `folder`."""
    if state := _state_to_change(folder, "item_embeddings"):
        _write(folder.root, {**state, "next": folder.names.get("item_embeddings")})


def to_index(run: str) -> RunFolder:
    """Return the run folder with the newest embeddings and places for index and channels."""
    folder, newest = served(run), _state(run).get("next")
    if newest:
        folder = RunFolder(run, {**folder.names, "item_embeddings": newest})
    folder = _with_new(folder, "index")
    name = folder.names.get("index", "index").replace("index", "channels")
    return RunFolder(run, {**folder.names, "channels": name}) if name != "channels" else folder


def to_update(run: str) -> RunFolder:
    """Return the run folder that serves, with a place for a delta."""
    return _with_new(served(run), "delta")


def serve_from(folder: RunFolder) -> None:
    """Let the complete parts of `folder` serve, and remove those that served before the last."""
    state = _state_to_change(folder, "index")
    if not state:
        return
    names = dict(folder.names)
    if names.get("index") != state["current"].get("index"):
        names.pop("delta", None)  # it adds to another index
        state.pop("next", None)
    _write(folder.root, {**state, "current": names, "previous": state["current"]})
    _clean(folder.root)


def start_over(run: str) -> None:
    """Remove the parts of an earlier bundle, finished or not, before others are made."""
    remove(RunFolder(run).path(CURRENT))
    for name in _listed(run):
        remove(RunFolder(run).path(name))
        remove(WorkFolder(RunFolder(run).path(name)).root)


def _state(run: str) -> dict[str, Any]:
    path = RunFolder(run).path(CURRENT)
    return dict(read_json(path)) if exists(path) else {}


def _state_to_change(folder: RunFolder, part: str) -> dict[str, Any]:
    """Return what `current.json` says or would say, or nothing if none is needed yet."""
    state = _state(folder.root)
    if not state and folder.names.get(part, part) == part and "delta" not in folder.names:
        return {}
    return {"current": {}, **state}


def _write(run: str, state: dict[str, Any]) -> None:
    write_json(state, RunFolder(run).path(CURRENT))


def _with_new(folder: RunFolder, part: str) -> RunFolder:
    """Return `folder` with a name for a part that nothing complete or in use has."""
    plain = exists(folder.path(part, "manifest.json")) or exists(folder.path(CURRENT))
    if not plain and part != "delta":
        return folder
    found = (_NAMED.fullmatch(name) for name in _listed(folder.root))
    numbers = [int(name["number"] or 1) for name in found if name and name["part"] == part]
    return RunFolder(folder.root, {**folder.names, part: f"{part}-{max(numbers, default=1) + 1}"})


def _listed(run: str) -> list[str]:
    """Return the names of all parts in the run folder, complete or not."""
    fs, path = open_filesystem(run)
    fs.invalidate_cache()  # other processes may have written to it
    names = (str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False))
    return sorted(name for name in names if _NAMED.fullmatch(name))


def _clean(run: str) -> None:
    state = _state(run)
    kept = {state.get("next")}
    for names in (state["current"], state.get("previous", {})):
        kept |= {names.get(part, part) for part in PARTS}
    for name in set(_listed(run)) - kept:
        remove(RunFolder(run).path(name))

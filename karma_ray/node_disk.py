"""The folder in which a node keeps what its processes share, and what goes when it is full.

It lies in the system's temporary folder (TMPDIR) and may be removed at any time between runs. It
takes at most half of the disk that others leave free, or as many GB as the environment variable
KARMA_RAY_NODE_GB says: when something new comes, what was used longest ago goes, and so does what
was not used for a month, but nothing that a living process uses.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import stat
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from karma_ray.artifacts import locked
from karma_ray.errors import InputError

LIMIT = "KARMA_RAY_NODE_GB"
UNUSED_SECONDS = 30 * 86_400.0
"""What was not used for so long goes even if there is room."""
HOLDS = 32
"""What a process has used of late is not pruned while it lives; what it used before that may be, as
an endpoint that lives for a year does not need each of its models."""
_held: dict[Path, IO[bytes]] = {}


def node_folder() -> Path:
    """Return a folder shared by all processes of the user, and closed to other users."""
    folder = Path(tempfile.gettempdir(), f"karma_ray-node-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise InputError("temporary folder", str(folder), "is not private; remove it or set TMPDIR")
    return folder


def kept(target: Path, make: Callable[[], None]) -> Path:
    """Return `target`, which `make` writes unless it is there; one process of the node does."""
    hold(target)
    if not target.exists():
        with locked(str(target)):
            if new := not target.exists():
                make()
        if new and _place(target):
            prune()
    return target


def hold(target: Path) -> None:
    """Let nobody prune `target` while this process lives; of no effect outside the node's folder.

    The system ends a hold with its process, however that ends.
    """
    if (place := _place(target)) is None:
        return
    if (sign := _held.pop(place, None)) is None:
        place.parent.mkdir(exist_ok=True)
        sign = open(_sign(place), "ab")  # noqa: SIM115
        fcntl.flock(sign, fcntl.LOCK_SH)
    os.utime(sign.fileno())
    _held[place] = sign
    while len(_held) > HOLDS:
        _held.pop(next(iter(_held))).close()


def prune() -> None:
    """Remove what was used longest ago, until the node's folder is as small as it has to be."""
    folder, places = node_folder(), defaultdict[Path, list[Path]](list)
    for path in [*folder.iterdir(), *folder.glob("copies/*")]:
        if path.name not in ("copies", "hashes") and path.suffix not in (".lock", ".use"):
            places[path.with_name(_key(path.name))].append(path)
    sizes = {place: sum(map(_size, paths)) for place, paths in places.items()}
    excess, now = sum(sizes.values()) - _limit(folder, sum(sizes.values())), time.time()
    for used, place in sorted((_last_use(place, paths), place) for place, paths in places.items()):
        if excess <= 0 and now - used < UNUSED_SECONDS:
            return
        with open(_sign(place), "ab") as sign, suppress(BlockingIOError):
            fcntl.flock(sign, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in filter(Path.exists, places[place]):
                draft = path.with_name(f"{path.name}.tmp")  # half a folder would look complete
                remove_path(draft)
                os.replace(path, draft)
                remove_path(draft)
            excess -= sizes[place]


def _place(path: Path) -> Path | None:
    """Return the name of what is kept and pruned together: a file and its drafts, or a copy."""
    folder = node_folder()
    if not path.is_relative_to(folder):
        return None
    first, *rest = path.relative_to(folder).parts
    return folder / first / _key(rest[0]) if rest else folder / _key(first)


def _key(name: str) -> str:
    return name.split(".")[0]


def _sign(place: Path) -> Path:
    """Return the file that is locked by those who use a place, and that says when it was used."""
    return place.with_name(f"{place.name}.use")


def _last_use(place: Path, paths: list[Path]) -> float:
    known = [*_found([_sign(place)])] or _found(paths)
    return max((found.st_mtime for found in known), default=0.0)


def _size(path: Path) -> int:
    inside = (Path(root, name) for root, _, names in os.walk(path) for name in names)
    return sum(found.st_blocks * 512 for found in _found([path, *inside]))


def _found(paths: Iterable[Path]) -> Iterator[os.stat_result]:
    for path in paths:
        with suppress(FileNotFoundError):  # others rename and remove
            yield path.lstat()


def _limit(folder: Path, taken: int) -> float:
    """Return the bytes that the folder may hold, of which `taken` are there."""
    if not (given := os.environ.get(LIMIT)):
        return (shutil.disk_usage(folder).free + taken) / 2
    with suppress(ValueError):
        if (most := float(given) * 1e9) >= 0 and math.isfinite(most):
            return most
    raise InputError(LIMIT, given, "must be a number of GB")


def remove_path(path: Path) -> None:
    """Remove a file or folder of this machine if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)

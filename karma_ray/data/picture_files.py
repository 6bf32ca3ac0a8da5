"""Pictures that lie in files of their own: the items table names them, here they are fetched.

A name is a URI of any file system of fsspec, a path, or a path relative to the folder that holds
items/.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from karma_ray.artifacts import absolute, join, open_filesystem
from karma_ray.stores import failure

FETCHES = 16
"""Files that a process reads at the same time."""
MAX_BYTES = 64 * 2**20
"""Largest file; a larger one is no picture of an item."""


class BrokenImage(ValueError):
    """Raised for what is not a readable image; the message is the reason."""


def beside(folder: str) -> str:
    """Return the folder that relative names of the table in `folder` start from."""
    return absolute(folder).rstrip("/").rsplit("/", 1)[0]


def full_name(name: str, base: str) -> str:
    """Return a name that does not depend on where it stands."""
    return name if "://" in name or name.startswith("/") else join(base, name)


def fetch(names: Sequence[str | None], base: str) -> list[bytes | BrokenImage | None]:
    """Return the bytes of each named file, or why it cannot be read; None where no name is.

    Relative names start from `base`. An error of a store that does not answer, even after repeated
    tries, is raised, because the picture may well be there.
    """
    with ThreadPoolExecutor(FETCHES) as pool:
        return list(pool.map(partial(_fetch, base=base), names))


def _fetch(name: str | None, base: str) -> bytes | BrokenImage | None:
    if not name:
        return None
    uri = full_name(name, base)
    try:
        fs, path = open_filesystem(uri)
        data = bytes(fs.cat_file(path, start=0, end=MAX_BYTES + 1))
    except Exception as error:  # file systems raise many kinds of errors
        if failure(error):
            raise
        return BrokenImage(f"{uri}: {type(error).__name__}: {' '.join(str(error).split())}")
    return data if len(data) <= MAX_BYTES else BrokenImage(f"{uri}: has more than 64 MiB")

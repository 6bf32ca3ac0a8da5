"""People whose rows leave every table, also when the data are prepared again later.

`OUT/forgotten_users.txt` holds the SHA-256 of their ids and not the ids. Their rows are left out
when events are read, before they are checked: not even the rejected rows have one of theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from karma_ray.artifacts import exists, join, read_bytes, value_hash, write_bytes
from karma_ray.data.schema import EVENTS, check_columns
from karma_ray.errors import InputError

NAME = "forgotten_users.txt"


def read_user_ids(uri: str) -> list[str]:
    """Read a text file with a user id per line; raises InputError when it is missing or empty."""
    if not exists(uri):
        raise InputError("--forget-users", uri, "does not exist")
    try:
        lines = read_bytes(uri).decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError("--forget-users", uri, f"is not text in UTF-8 ({error})") from None
    if not (users := [line for line in lines if line.strip()]):
        raise InputError("--forget-users", uri, "names no user")
    return users


@dataclass(frozen=True)
class Forgotten:
    """The hashes of forgotten ids."""

    hashes: frozenset[str] = frozenset()

    @classmethod
    def of(cls, target: str, users: Iterable[str] = ()) -> Forgotten:
        """Return those that were forgotten in `target` before, and `users`, who are remembered."""
        path = join(target, NAME)
        before = frozenset(read_bytes(path).decode().split()) if exists(path) else frozenset()
        hashes = before | {_hash(user) for user in users}
        if hashes != before:
            write_bytes("".join(f"{each}\n" for each in sorted(hashes)).encode(), path)
        return cls(hashes)

    @property
    def key(self) -> str:
        """Identifies the set."""
        return value_hash(sorted(self.hashes)) if self.hashes else ""

    def rows(self, user_ids: pa.ChunkedArray, source: str) -> tuple[np.ndarray, dict[str, int]]:
        """Return the mask [rows] of their rows, and the number of rows per hash found."""
        if not self.hashes:
            return np.zeros(len(user_ids), dtype=bool), {}
        table = pa.table({"user_id": user_ids})
        ids = check_columns(table, pa.schema([EVENTS.field("user_id")]), source)["user_id"]
        coded = pc.dictionary_encode(ids.combine_chunks())
        coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
        hashes = [_hash(user) for user in coded.dictionary.to_pylist()]
        wanted = np.array([each in self.hashes for each in hashes] + [False])
        of_row = pc.fill_null(coded.indices, len(hashes)).to_numpy(zero_copy_only=False)
        counts = np.bincount(of_row, minlength=wanted.size)
        found = {hashes[n]: int(counts[n]) for n in np.flatnonzero(wanted) if counts[n]}
        return wanted[of_row], found

    def counts(self, found: Iterable[Mapping[str, int]]) -> dict[str, int]:
        """Return how many users and rows were found in all parts, and how many users were not."""
        if not self.hashes:
            return {}
        parts = list(found)
        users = {each for part in parts for each in part}
        return {
            "forgotten_users": len(users),
            "forgotten_rows": sum(rows for part in parts for rows in part.values()),
            "forgotten_not_found": len(self.hashes - users),
        }


def _hash(user: str) -> str:
    return hashlib.sha256(user.encode()).hexdigest()

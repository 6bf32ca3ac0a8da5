"""Finished parts of a report, which an interrupted one does not measure again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from karma_ray.artifacts import exists, join, open_filesystem, read_json, value_hash, write_json
from karma_ray.funnel.outcomes import UserSums

VERSION = 1
"""Raised when the code measures something else, so that earlier parts are measured again."""
FOLDER = "finished"


@dataclass(frozen=True)
class Finished:
    """The parts in OUT/finished: a table of sums per user and a JSON of facts for each."""

    out: str
    key: str
    """Hash of what all parts depend on: data, sizes, sample."""

    def part(
        self, stage: str, name: str, depends: Any, measure: Callable[[], tuple[UserSums, Any]]
    ) -> tuple[UserSums, dict[str, Any]]:
        """Return a part as it was measured, now or earlier."""
        stem = f"{stage}-{name}-{value_hash([VERSION, self.key, depends])}"
        table, facts = (join(self.out, FOLDER, f"{stem}{end}") for end in (".parquet", ".json"))
        if not exists(facts):
            sums, found = measure()
            write_parquet(sums.table(), table)
            write_json(found, facts)  # last: it says that the part is complete
        return UserSums.read(read_parquet(table)), dict(read_json(facts))


def write_parquet(table: Any, uri: str) -> None:
    """Write one Parquet file, creating its folder."""
    fs, path = open_filesystem(uri)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    with fs.open(path, "wb") as sink:
        pq.write_table(table, sink)


def read_parquet(uri: str) -> Any:
    """Read one Parquet file."""
    fs, path = open_filesystem(uri)
    with fs.open(path, "rb") as file:
        return pq.read_table(file)

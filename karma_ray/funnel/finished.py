"""Finished parts of a report, which an interrupted one does not measure again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from karma_ray.artifacts import (
    exists,
    join,
    read_json,
    read_table,
    value_hash,
    write_json,
    write_table,
)
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
        folder = join(self.out, FOLDER)
        table, facts = (join(folder, f"{stem}{end}") for end in (".parquet", ".json"))
        if not exists(facts):
            sums, found = measure()
            write_table(sums.table(), folder, stem)
            write_json(found, facts)  # last: it says that the part is complete
        return UserSums.read(read_table(table)), dict(read_json(facts))

"""The folder in which a job collects the parts of a table, so that an interrupted one goes on.

A part is a Parquet file and its facts, a small JSON file that is written after it. Workers of any
machine write parts; whoever starts the job again finds which of them are finished. The table
appears under its name when it is complete, and until then an earlier one stays there.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from karma_ray.artifacts import (
    exists,
    join,
    move,
    open_filesystem,
    read_json,
    remove,
    write_json,
    write_table,
)

_KEY = "key.json"


@dataclass(frozen=True)
class Part:
    """A range of rows, and the name of the part that holds what is made of them."""

    first: int
    end: int
    name: str


@dataclass(frozen=True)
class WorkFolder:
    """The parts of the table `target`, in `target`-work beside it."""

    target: str

    @property
    def root(self) -> str:
        """The folder with everything that an attempt leaves."""
        return f"{self.target}-work"

    @property
    def table(self) -> str:
        """The folder that becomes the table; its manifest is written when all parts are there."""
        return join(self.root, "table")

    def open(self, key: Any) -> None:
        """Keep what an earlier attempt has left if it had the same key, a JSON value."""
        open_work(self.root, key)

    def write(self, name: str, table: pa.Table | None, facts: Any) -> None:
        """Write a part and its facts, a JSON value; a part may have no rows."""
        if table is not None:
            write_table(table, self.table, name)
        write_json({"has_rows": table is not None, "facts": facts}, self._facts(name))

    def finished(self) -> dict[str, Any]:
        """Return the facts of the finished parts by name."""
        parts = documents(join(self.root, "facts"))
        fs, root = open_filesystem(self.root)
        tables = {name.rsplit("/", 1)[-1] for name in fs.find(f"{root}/table")}
        return {
            name: part["facts"]
            for name, part in sorted(parts.items())
            if not part["has_rows"] or f"{name}.parquet" in tables
        }

    def finished_part(self, name: str) -> Any:
        """Return the facts of a part, or None if it is not finished."""
        return read_json(self._facts(name))["facts"] if exists(self._facts(name)) else None

    def keep(self, names: Collection[str]) -> str | None:
        """Keep the finished parts of these names in the table, and remove what is not finished.

        Rows of other finished parts, as of an earlier state of the input, are set aside; returns
        their folder if there are any.
        """
        fs, root = open_filesystem(self.root)
        aside, done = f"{root}/aside", self.finished()
        for path in fs.find(f"{root}/table"):
            name = path.rsplit("/", 1)[-1].removesuffix(".parquet")
            if name not in done:
                fs.rm(path)
            elif name not in names:
                fs.makedirs(aside, exist_ok=True)
                fs.mv(path, f"{aside}/{name}.parquet")
                fs.rm(f"{root}/facts/{name}.json")
        return join(self.root, "aside") if fs.exists(aside) else None

    def complete(self) -> None:
        """Let the table, whose manifest is written, take the place of the target."""
        remove(self.target)
        move(self.table, self.target)
        remove(self.root)

    def _facts(self, name: str) -> str:
        return join(self.root, "facts", f"{name}.json")


def documents(folder: str) -> dict[str, Any]:
    """Return the JSON files of a folder, which other processes may write to, by their names."""
    fs, path = open_filesystem(folder)
    fs.invalidate_cache()
    named = [name for name in fs.find(path) if name.endswith(".json")]
    found = fs.cat(named) if named else {}
    return {name.rsplit("/", 1)[-1][:-5]: json.loads(told) for name, told in found.items()}


def open_work(folder: str, key: Any) -> None:
    """Keep the content of a work folder if it was opened with an equal key; otherwise empty it."""
    marker = join(folder, _KEY)
    if exists(folder) and not (exists(marker) and read_json(marker) == key):
        remove_work(folder)
    write_json(key, marker)


def remove_work(folder: str) -> None:
    """Remove a work folder if there is one, its key first.

    What is left when this is interrupted lacks some files, and is not taken for work to go on with.
    """
    remove(join(folder, _KEY))
    remove(folder)

"""A long import of a log: the passes one after another, and what is kept of a killed one."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa
from tqdm import tqdm

from karma_ray.artifacts import join, open_filesystem, read_table
from karma_ray.data.importers import output
from karma_ray.data.importers.exposures import Exposures, LogFacts
from karma_ray.data.importers.import_work import (
    ImportSizes,
    ImportWork,
    RowsFile,
    part_name,
    piece_names,
)
from karma_ray.data.importers.log_passes import (
    FoldUsers,
    ReadFile,
    WriteEvents,
    divide,
    times_of,
)
from karma_ray.data.importers.output import DataFolder
from karma_ray.data.importers.page_folding import PageCounts
from karma_ray.data.table_hash import table_hash
from karma_ray.data.tasks import RunTasks, Task
from karma_ray.data.user_rows import num_partitions
from karma_ray.errors import InputError

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class LogImport:
    """What an import reads, where it works and who runs its tasks."""

    log: Exposures
    data: DataFolder
    work: ImportWork
    sizes: ImportSizes
    run: RunTasks

    def read(self) -> tuple[LogFacts, list[dict[str, Any]]]:
        """Read the files that are not read yet; returns what is known of all, and of each.

        The rejected rows are quarantined in the order of the log. Raises InputError on columns
        that only some files have, or none, and TooManyBadRows on too much damage.
        """
        task, files = ReadFile(self.log, self.work, self.sizes), self.log.files.files
        done = self.work.facts("read")
        missing = [file for file in files if task.name(file) not in done]
        if len(missing) < len(files):
            LOG.info("import: %d of %d files are read", len(files) - len(missing), len(files))
        self._do(task, missing, "files of the log")
        done = self._facts("read", map(task.name, files))
        found = [{"name": task.name(file), **done[task.name(file)]} for file in files]
        facts = LogFacts()
        for one in found:
            facts.add(LogFacts.from_json(one["log"]))
            for name in piece_names(one["name"], one["pieces"]["quarantine"]):
                rejected = read_table(self.work.path("quarantine", f"{name}.parquet"))
                self.data.quarantine(pl.DataFrame(pl.from_arrow(rejected)))
        self.log.check(facts)
        return facts, found

    def fold(self, facts: LogFacts, of_files: Sequence[dict[str, Any]]) -> PageCounts:
        """Fold the rows of `of_files` to pages and write these as the table events."""
        data, work = self.data, self.work
        rows, place = [], 0
        for one in of_files:
            rows += [RowsFile(n, place) for n in piece_names(one["name"], one["pieces"]["rows"])]
            place += one["log"]["num_places"]
        num_bytes, item_ids = sum(one["bytes"] for one in of_files), data.item_ids
        partitions = num_partitions(1, num_bytes, self.sizes.partition_bytes)
        of_items = table_hash(pa.table({"item_id": item_ids}))
        names = [file.name for file in rows]
        made_of = [names, facts.names, of_items, self.sizes.range_pages, output.ROWS_PER_PART]
        work.open_pages([made_of, partitions])
        fold = FoldUsers(work, rows, partitions, facts.names, item_ids, self.log.by_row, self.sizes)
        folded = self._finish("pages/facts", fold, range(partitions), "partitions of users")
        parts = divide(
            (one["times"] for one in folded), times_of(work, partitions),
            output.ROWS_PER_PART, self.sizes.range_pages,
        )  # fmt: skip
        write = WriteEvents(work, partitions, item_ids, join(data.work, "events"))
        for one in self._finish("pages/events", write, parts, "parts of the events"):
            data.count("events", one["rows"], one["hash"], one["counts"])
        _remove_others(write.folder, {f"{part_name(part.number)}.parquet" for part in parts})
        counts = PageCounts()
        for one in folded:
            counts.add(PageCounts(**one["counts"]))
        return counts

    def _finish(
        self, kind: str, task: Task, inputs: Sequence[Any], what: str
    ) -> list[dict[str, Any]]:
        """Run the tasks whose facts are not there, by their number; returns the facts of all."""
        names = [part_name(number) for number in range(len(inputs))]
        done = self.work.facts(kind)
        missing = [one for name, one in zip(names, inputs, strict=True) if name not in done]
        self._do(task, missing, what)
        done = self._facts(kind, names)
        return [done[name] for name in names]

    def _facts(self, kind: str, names: Iterable[str]) -> dict[str, Any]:
        """Return the facts of tasks that have ended; raises InputError if some are not there."""
        found = self.work.facts(kind)
        if lost := [name for name in names if name not in found]:
            problem = f"lacks what {len(lost)} tasks wrote: all nodes must share it, as s3:// is"
            raise InputError("OUT", self.data.uri, problem)
        return found

    def _do(self, task: Task, inputs: Sequence[Any], what: str) -> None:
        small = self.log.files.num_bytes <= self.sizes.here_bytes
        # None hides it where no terminal is.
        with tqdm(total=len(inputs), desc=what, disable=True if small else None) as bar:
            for _ in self.run(task, inputs, small):
                bar.update()


def _remove_others(folder: str, names: Collection[str]) -> None:
    """Remove what killed writers, or an attempt with other rows, have left in a folder."""
    fs, path = open_filesystem(folder)
    fs.invalidate_cache()
    for name in fs.ls(path, detail=False):
        if name.rsplit("/", 1)[-1] not in names:
            fs.rm(name, recursive=True)

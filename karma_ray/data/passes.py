"""The two passes of `prepare` over a log that need not fit into memory, as tasks.

    part of the log   --PartCheck-->       clean rows by user, rejected rows, clicks per time
    partition of users --PartitionBuild--> one file each of sequences/ and examples/split=.../

A task takes one part or one partition at a time, writes its files whole or not at all, and then
its report. A task that runs twice replaces its own files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from karma_ray.artifacts import join, remove, value_hash, write_json, write_table
from karma_ray.data.click_times import click_times, clicks_per_day
from karma_ray.data.config import PrepareConfig
from karma_ray.data.event_parts import READERS, EventPart, PartRows, read_part, starts
from karma_ray.data.forgotten import Forgotten
from karma_ray.data.preparation import add_up, beyond_cap, build_partition
from karma_ray.data.prepare_work import PrepareWork
from karma_ray.data.prepared import PREPARE_VERSION
from karma_ray.data.reading import quarantine_of
from karma_ray.data.splits import Cutoffs
from karma_ray.data.user_rows import joined, newest, read_rows, slot_range, write_rows
from karma_ray.data.validation import CLEAN_EVENTS, check_events, count_reasons
from karma_ray.errors import LeakError

PARTS_AT_ONCE = 32
"""Parts whose rows of a partition are read before robots' rows are dropped."""
CAPS_HELD = 4
"""A partition with fewer rows than so many times the cap of a user is as it is."""


@dataclass(frozen=True)
class PartCheck:
    """Cleans one part of the events and writes its rows by user."""

    folder: str
    """The folder events/."""
    work: PrepareWork
    item_ids: pa.Array
    config: PrepareConfig
    forgotten: Forgotten = field(default_factory=Forgotten)
    with_unclicked: bool = False
    """Keep pages without clicks, which only a model of click-through rates learns from."""

    def __call__(self, part: EventPart) -> None:
        """Check a part; its facts in the work folder are written last."""
        read, source = read_part(self.folder, part), join(self.folder, part.file)
        theirs, found = self.forgotten.rows(read.table["user_id"], source)
        facts = self.work.facts_of(part)
        if facts is None or facts["forgotten"] != found:
            facts = self._check(read, theirs, part, source)
        facts |= {"forgotten": found, "forgotten_key": self.forgotten.key}
        write_json(facts, self.work.path("parts", part))

    def _check(
        self, read: PartRows, forgotten: np.ndarray, part: EventPart, source: str
    ) -> dict[str, Any]:
        """Write all files of a part but its facts, which are returned."""
        remove(self.work.path("parts", part))
        table, rows = read.table, read.numbers
        if forgotten.any():
            table, rows = table.filter(pa.array(~forgotten)), rows[~forgotten]
        checked = check_events(table, self.item_ids, source, with_unclicked=self.with_unclicked)
        # Numbered as in the file, which has the forgotten rows too.
        clean = _numbered(checked.table, "order", rows)
        quarantine = _numbered(checked.quarantine, "row", rows)
        reasons = Counter(count_reasons(quarantine))
        for one in read.lost:
            reasons[one.reason] += one.num_rows or 1
        num_lost = sum(one.num_rows or 0 for one in read.lost)
        kept = newest(clean, self.config.max_user_events)
        times = click_times(clean)
        write_rows(kept, self.work.path("rows", part), self.config.num_partitions)
        unknown = pa.table({"item_id": checked.unknown_ids})
        for kind, of_kind in (
            ("quarantine", pa.concat_tables([quarantine, quarantine_of(read.lost)])),
            ("unknown", unknown), ("times", times),
        ):  # fmt: skip
            self.work.write_part_table(kind, part, of_kind)
        event_rows = checked.counts["event_rows"] + num_lost
        return {
            "counts": {**checked.counts, "event_rows": event_rows, **beyond_cap(clean, kept)},
            "reasons": dict(reasons),
            "lost": [asdict(one) for one in read.lost],
            "days": clicks_per_day(times),
        }


@dataclass(frozen=True)
class PartitionBuild:
    """Turns the clean events of one partition of users into its files."""

    work: PrepareWork
    parts: Sequence[EventPart]
    num_partitions: int
    cutoffs: Cutoffs
    config: PrepareConfig
    held_out: pa.Array | None = None
    """Ids of items that are in no training window."""
    forgotten: str = ""
    """The key of the people whose rows are in no part."""

    def key(self) -> str:
        """Identify the tables of all partitions, so that only these are gone on with."""
        held_out = None if self.held_out is None else value_hash(self.held_out.to_pylist())
        names = [part.name for part in self.parts]
        made_of = [PREPARE_VERSION, names, self.forgotten, held_out]
        return value_hash([made_of, self.num_partitions, self.cutoffs.iso(), asdict(self.config)])

    def __call__(self, partition: int) -> None:
        """Build one partition; its report in the work folder is written last.

        A leak is reported instead of raised. Nothing is published while there is a leak.
        """
        name, build = f"part-{partition:05d}", self.work.build
        report: dict[str, Any] = {"partition": partition, "counts": {}, "leak": None}
        rows, num_dropped = partition_rows(
            self.work, self.parts, partition, self.num_partitions, self.config
        )
        try:
            if rows.num_rows:
                built = build_partition(rows, self.cutoffs, self.config, self.held_out)
                write_table(built.sequences, join(build, "sequences"), name)
                for split, table in built.examples.items():
                    write_table(table, join(build, "examples", f"split={split}"), name)
                of_robots = {"events_beyond_cap": num_dropped} if num_dropped else {}
                report["counts"] = add_up([built.counts, of_robots])
        except LeakError as leak:
            report["leak"] = str(leak)
        write_json(report, join(build, "reports", f"{name}.json"))


def partition_rows(
    work: PrepareWork, parts: Sequence[EventPart], partition: int, num_partitions: int,
    config: PrepareConfig,
) -> tuple[pa.Table, int]:  # fmt: skip
    """Return the clean events (CLEAN_EVENTS) of one partition of users, from all checked parts.

    Every part has kept up to `max_user_events` rows of a user. So that those of one user with
    rows in all parts are not held, rows beyond the cap are dropped on the way; their number is
    returned too. Some may be left.
    """
    slots, most = (
        slot_range(partition, num_partitions, config.num_partitions),
        config.max_user_events,
    )
    # Rows are numbered in their files, and start at the part's first row there.
    offsets = [start - part.first_row for start, part in zip(starts(parts), parts, strict=True)]
    rows, num_dropped = CLEAN_EVENTS.empty_table(), 0
    with ThreadPoolExecutor(READERS) as readers:
        for first in range(0, len(parts), PARTS_AT_ONCE):
            some = slice(first, first + PARTS_AT_ONCE)
            read = readers.map(lambda part: read_rows(work.path("rows", part), slots), parts[some])
            rows = pa.concat_tables([rows, joined(list(read), offsets[some])])
            if rows.num_rows > CAPS_HELD * most:
                kept = newest(rows, most)
                num_dropped += rows.num_rows - kept.num_rows
                rows = kept
    return rows, num_dropped


def _numbered(table: pa.Table, name: str, numbers: np.ndarray) -> pa.Table:
    """Replace row numbers [rows] among the rows that were checked by `numbers`."""
    place = table.schema.get_field_index(name)
    return table.set_column(
        place, table.schema.field(place), pa.array(numbers[table[name].to_numpy()])
    )

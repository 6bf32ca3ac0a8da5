"""Preparation of events into sequences and examples: two passes and one shuffle by user.

    fragments --map--> clean events (+ quarantine, counts, click times, written beside)
              --split by hash(user) into num_partitions--> whole partitions
              --vectorised code--> sequences/, examples/split=.../ (one file per partition)

A `Shuffle` does the mapping and splitting: this process by default, or Ray Data for tables that
are too large for it (cluster/sharding.py). Both write the same files. Each file is named after
its fragment or partition, so a task that runs twice replaces its own file.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from karma_ray.artifacts import absolute, exists, join, locked, read_table, write_table
from karma_ray.data.fragments import Fragment, read_fragment
from karma_ray.data.preparation import (
    add_up,
    build_partition,
    catalogue_ids,
    click_times,
    cutoffs_of,
    held_out_ids,
    make_facts,
)
from karma_ray.data.prepared import (
    PreparedData,
    differences,
    fingerprint,
    read_data_manifest,
    require_data,
)
from karma_ray.data.sessions import PrepareConfig
from karma_ray.data.splits import Cutoffs
from karma_ray.data.staging import (
    WORK,
    count_quarantined,
    event_fragments,
    publish,
    read_catalogue,
    remove,
)
from karma_ray.data.validation import check_events
from karma_ray.errors import InputError, LeakError

LOG = logging.getLogger(__name__)


class Shuffle(Protocol):
    """The two steps of preparation that read every row."""

    def check(self, fragments: Sequence[Fragment], check: FragmentCheck, partitions: int) -> Any:
        """Return the clean rows of all fragments, in any form that `build` accepts."""

    def build(self, clean: Any, build: PartitionBuild, partitions: int) -> list[dict[str, Any]]:
        """Return the reports of `build` for every partition of users that has rows."""


def ensure_prepared(
    data_uri: str, config: PrepareConfig, shuffle: Shuffle | None = None
) -> PreparedData:
    """Return the prepared data at `data_uri`, preparing them first if needed.

    They are reused if they were prepared with `config` from the same files. Data that came
    pre-split (their prepared.json says `"presplit": true`) are used unchanged. Raises InputError
    when the data must be prepared again, or categories be held out, but they have no events.
    """
    require_data(data_uri)
    if (data := _standing(data_uri, config)) is not None:
        return data
    config.check()
    with locked(join(absolute(data_uri), "prepare")):
        if _standing(data_uri, config) is None:  # another process may have prepared them meanwhile
            _prepare_into(data_uri, config, data_uri, shuffle or LocalShuffle())
    return PreparedData.load(data_uri)


def _standing(data_uri: str, config: PrepareConfig) -> PreparedData | None:
    """Return the prepared data at `data_uri`, or None if they must be prepared."""
    has_events = exists(join(data_uri, "events"))
    if exists(join(data_uri, "prepared.json")):
        data = PreparedData.load(data_uri)
        changed = {} if data.facts.get("presplit") else differences(data.facts, config)
        if data.facts.get("presplit") and config.hold_out:
            message = f"is not possible: {data_uri} came split, without events"
            raise InputError("prepare.hold_out", config.hold_out, message)
        if data.facts.get("presplit") or (not changed and not has_events):
            return data
        if not has_events:
            listed = ", ".join(f"prepare.{k} {a!r} -> {b!r}" for k, (a, b) in changed.items())
            raise InputError("--data", data_uri, f"has no events to prepare again with {listed}")
        if not changed and data.facts.get("input") == fingerprint(data_uri):
            return data
    elif not has_events:
        raise InputError("--data", data_uri, "has neither prepared.json nor events/")
    return None


def prepare(
    data_uri: str, config: PrepareConfig, out: str | None = None, shuffle: Shuffle | None = None
) -> dict[str, Any]:
    """Write sequences/, examples/, quarantine/ and prepared.json to `out` (default: `data_uri`).

    Returns the content of prepared.json. Raises InputError, TooManyBadRows (the quarantine is
    kept for inspection) and LeakError.
    """
    config.check()
    require_data(data_uri)
    with locked(join(absolute(out or data_uri), "prepare")):
        return _prepare_into(data_uri, config, out or data_uri, shuffle or LocalShuffle())


def _prepare_into(
    data_uri: str, config: PrepareConfig, out: str, shuffle: Shuffle
) -> dict[str, Any]:
    source, target = absolute(data_uri), absolute(out)
    remove(join(target, WORK))
    try:
        return _prepare(source, target, config, shuffle)
    finally:
        remove(join(target, WORK))


def partition_of(user_ids: pa.ChunkedArray, num_partitions: int) -> pa.ChunkedArray:
    """Return the partition [rows] int32 of each user, by a hash equal in every process."""
    coded = pc.dictionary_encode(pa.concat_arrays([pa.array([], pa.string()), *user_ids.chunks]))
    users = coded.dictionary.to_pylist()
    of_user = pa.array([zlib.crc32(user.encode()) % num_partitions for user in users], pa.int32())
    return pa.chunked_array([of_user.take(coded.indices)])


def _prepare(source: str, target: str, config: PrepareConfig, shuffle: Shuffle) -> dict[str, Any]:
    manifest = read_data_manifest(source)
    fragments = event_fragments(source)
    num_rows = sum(fragment.num_rows for fragment in fragments)
    items, item_counts = read_catalogue(source, target, config.max_bad_share)
    item_ids = catalogue_ids(items)
    held_out, of_held_out = held_out_ids(items, config)
    work = join(target, WORK)
    LOG.info("prepare: checking %d event rows against %d items", num_rows, len(item_ids))
    check = FragmentCheck(join(source, "events"), work, item_ids, config.num_partitions)
    clean = shuffle.check(fragments, check, config.num_partitions)
    quarantined = count_quarantined(target, num_rows, config.max_bad_share)
    cutoffs = cutoffs_of([read_table(join(work, "click_times"))], config, manifest)
    LOG.info("prepare: splitting by user into %d partitions", config.num_partitions)
    build = PartitionBuild(work, cutoffs, config, held_out)
    reports = shuffle.build(clean, build, config.num_partitions)
    rows = [*read_table(join(work, "counts")).to_pylist(), *reports]
    for leak in filter(None, (row["leak"] for row in rows)):
        raise LeakError(leak)
    counts = add_up([item_counts, of_held_out, *(json.loads(row["counts"]) for row in rows)])
    facts = make_facts(config, cutoffs, counts, quarantined, manifest)
    facts["input"] = fingerprint(source)
    if target != source:
        facts["data"] = source
    publish(target, facts)
    return facts


@dataclass(frozen=True)
class FragmentCheck:
    """Cleans one fragment of events, and writes its quarantine, click times and counts."""

    folder: str
    work: str
    item_ids: pa.Array
    num_partitions: int

    def __call__(self, fragment: Fragment) -> pa.Table:
        """Return the clean rows; the column `partition` has the partition of the user."""
        table = read_fragment(self.folder, fragment.path, fragment.row_group)
        checked = check_events(
            table, self.item_ids, fragment.path, fragment.first_row, fragment.order
        )
        part = f"part-{fragment.order:012d}"
        write_table(checked.quarantine, join(self.work, "quarantine"), f"events-{part}")
        write_table(click_times(checked.table), join(self.work, "click_times"), part)
        write_table(_report(checked.counts), join(self.work, "counts"), part)
        partition = partition_of(checked.table["user_id"], self.num_partitions)
        return checked.table.append_column("partition", partition)


@dataclass(frozen=True)
class PartitionBuild:
    """Turns the clean events of one partition of users into its files."""

    work: str
    cutoffs: Cutoffs
    config: PrepareConfig
    held_out: pa.Array | None = None
    """Ids of items that are in no training window."""

    def __call__(self, group: pa.Table) -> pa.Table:
        """Return one row with the partition's counts, as JSON.

        A leak is returned instead of raised: Ray Data passes on the text of a task's exception
        but not its type. Nothing is published while there is a leak.
        """
        part = f"part-{group['partition'][0].as_py():05d}"
        try:
            events = group.drop_columns(["partition"])
            built = build_partition(events, self.cutoffs, self.config, self.held_out)
        except LeakError as leak:
            return _report({}, str(leak))
        write_table(built.sequences, join(self.work, "sequences"), part)
        for split, table in built.examples.items():
            write_table(table, join(self.work, "examples", f"split={split}"), part)
        return _report(built.counts)


class LocalShuffle:
    """Processes everything in this process and its memory."""

    def check(self, fragments: Sequence[Fragment], check: FragmentCheck, partitions: int) -> Any:
        """Check one fragment after another."""
        return pa.concat_tables([check(fragment) for fragment in fragments])

    def build(self, clean: Any, build: PartitionBuild, partitions: int) -> list[dict[str, Any]]:
        """Build one partition after another."""
        of_row = clean["partition"].to_numpy()
        reports = []
        for partition in np.unique(of_row):
            group = clean.take(np.flatnonzero(of_row == partition))
            reports += build(group).to_pylist()
        return reports


def _report(counts: dict[str, int], leak: str | None = None) -> pa.Table:
    return pa.table({"counts": [json.dumps(counts)], "leak": pa.array([leak], pa.string())})

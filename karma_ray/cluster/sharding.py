"""Events -> sequences and examples on Ray Data: two passes and one shuffle by user.

    fragments --map--> clean events (+ quarantine, counts, click times, written beside)
              --shuffle by hash(user) into num_partitions--> whole partitions
              --vectorised code--> sequences/, examples/split=.../ (one file per partition)

The catalogue's ids are broadcast once. The shuffle's fixed cost is 5-15 seconds, whatever the
size (docs: nothing here maps over single users). Tasks write files named by fragment or
partition, so a task that Ray runs again replaces its own file; the caller sees the new tables
only after the last one is written.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from karma_ray.artifacts import (
    exists,
    join,
    open_filesystem,
    read_table,
    write_json,
    write_table,
)
from karma_ray.cluster.session import connect
from karma_ray.data.fragments import Fragment, list_fragments, read_fragment
from karma_ray.data.preparation import (
    CLICK_TIMES,
    add_up,
    build_partition,
    catalogue_ids,
    click_times,
    cutoffs_of,
    make_facts,
)
from karma_ray.data.prepared import (
    PreparedData,
    differences,
    fingerprint,
    read_data_manifest,
    require_data,
)
from karma_ray.data.schema import EVENTS, EXAMPLES, ITEMS, QUARANTINE, SEQUENCES, check_columns
from karma_ray.data.sessions import PrepareConfig
from karma_ray.data.splits import Cutoffs, check_shares
from karma_ray.data.validation import (
    check_events,
    check_items,
    check_share,
    count_reasons,
    event_columns,
)
from karma_ray.errors import InputError, KarmaRayError

LOG = logging.getLogger(__name__)

WORK = ".prepare"
"""Folder inside the target where new tables grow before they replace the old ones."""


def ensure_prepared(data_uri: str, config: PrepareConfig) -> PreparedData:
    """Prepared data of `data_uri`: what stands there when it was made with `config` from these
    files, else prepared now.

    A source that came pre-split (prepared.json says so) is taken as it is. Raises InputError
    when the data would have to be prepared anew and have no events.
    """
    require_data(data_uri)
    has_events = exists(join(data_uri, "events"))
    if exists(join(data_uri, "prepared.json")):
        data = PreparedData.load(data_uri)
        if data.facts.get("presplit"):
            return data
        changed = differences(data.facts, config)
        if not has_events and changed:
            listed = ", ".join(f"prepare.{k} {a!r} -> {b!r}" for k, (a, b) in changed.items())
            raise InputError("--data", data_uri, f"has no events to prepare anew with {listed}")
        if not changed and (not has_events or data.facts.get("input") == fingerprint(data_uri)):
            return data
    elif not has_events:
        raise InputError("--data", data_uri, "has neither prepared.json nor events/")
    prepare(data_uri, config)
    return PreparedData.load(data_uri)


def prepare(
    data_uri: str, config: PrepareConfig, out: str | None = None, progress: bool = True
) -> dict[str, Any]:
    """Write sequences/, examples/, quarantine/ and prepared.json to `out` (default: the data
    folder) and return the content of the latter.

    Raises InputError, TooManyBadRows (the quarantine is written first) and LeakError.
    """
    config.check()
    check_shares(config.valid_share, config.test_share)
    require_data(data_uri)
    target = out or data_uri
    work = join(target, WORK)
    fragments = _event_fragments(data_uri)
    _remove(work)
    try:
        return _prepare(data_uri, target, work, fragments, config, progress)
    except Exception as error:
        cause = _own_error(error)
        if cause is None or cause is error:
            raise
        raise cause from None
    finally:
        _remove(work)


def _prepare(
    data_uri: str,
    target: str,
    work: str,
    fragments: list[Fragment],
    config: PrepareConfig,
    progress: bool,
) -> dict[str, Any]:
    manifest = read_data_manifest(data_uri)
    item_ids, item_counts = _check_catalogue(data_uri, work, config, target)
    connect()
    _quiet(progress)
    if progress:
        rows = sum(fragment.num_rows for fragment in fragments)
        LOG.info("prepare: checking %d event rows against %d items", rows, len(item_ids))
    reader = _EventReader(join(data_uri, "events"), work, ray.put(item_ids), config.num_partitions)
    source = ray.data.from_items(
        [vars(fragment) for fragment in fragments], override_num_blocks=len(fragments)
    )
    clean = source.map_batches(reader, batch_size=1, batch_format="pyarrow").materialize()
    counts, reasons = _collect(work, fragments, config, target, item_counts)
    times = read_table(join(work, "click_times")).select(CLICK_TIMES.names)
    cutoffs = cutoffs_of([times], config, manifest)
    if progress:
        LOG.info("prepare: shuffling into %d partitions by user", config.num_partitions)
    writer = _PartitionWriter(work, cutoffs, config)
    grouped = clean.groupby("partition", num_partitions=config.num_partitions)
    results = grouped.map_groups(writer, batch_format="pyarrow").take_all()
    counts = add_up([counts, *(json.loads(row["counts"]) for row in results)])
    facts = make_facts(config, cutoffs, counts, reasons, manifest)
    facts["input"] = fingerprint(data_uri)
    if target != data_uri:
        facts["data"] = data_uri
    _publish(work, target, facts)
    return facts


@dataclass(frozen=True)
class _EventReader:
    """Task: one fragment of events -> its clean rows; the rest is written beside."""

    folder: str
    work: str
    item_ids: Any
    num_partitions: int

    @property
    def __name__(self) -> str:
        return "check_events"

    def __call__(self, batch: pa.Table) -> pa.Table:
        (row,) = batch.to_pylist()
        fragment = Fragment(**row)
        table = read_fragment(self.folder, fragment.path, fragment.row_group)
        checked = check_events(
            table, ray.get(self.item_ids), fragment.path, fragment.first_row, fragment.order
        )
        part = _part(fragment.order)
        write_table(checked.quarantine, join(self.work, "quarantine"), f"events-{part}")
        write_table(click_times(checked.table), join(self.work, "click_times"), part)
        counts = {"fragment": [json.dumps(checked.counts)]}
        write_table(pa.table(counts), join(self.work, "counts"), part)
        return checked.table.append_column(
            "partition", partition_of(checked.table["user_id"], self.num_partitions)
        )


@dataclass(frozen=True)
class _PartitionWriter:
    """Task: the clean events of one partition of users -> its files."""

    work: str
    cutoffs: Cutoffs
    config: PrepareConfig

    @property
    def __name__(self) -> str:
        return "build_partition"

    def __call__(self, group: pa.Table) -> pa.Table:
        part = _part(group["partition"][0].as_py())
        built = build_partition(group.drop_columns(["partition"]), self.cutoffs, self.config)
        write_table(built.sequences, join(self.work, "sequences"), part)
        for split, table in built.examples.items():
            write_table(table, join(self.work, "examples", f"split={split}"), part)
        return pa.table({"counts": [json.dumps(built.counts)]})


def partition_of(user_ids: pa.ChunkedArray, num_partitions: int) -> pa.ChunkedArray:
    """Partition [rows] int32 of each user, by a hash that is the same in every process."""
    coded = pc.dictionary_encode(user_ids).combine_chunks()
    users = coded.dictionary.to_pylist()
    of_user = pa.array([zlib.crc32(user.encode()) % num_partitions for user in users], pa.int32())
    return pa.chunked_array([of_user.take(coded.indices)])

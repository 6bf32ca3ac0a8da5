"""Events -> sequences and examples on Ray Data: two passes and one shuffle by user.

    fragments --map--> clean events (+ quarantine, counts, click times, written beside)
              --shuffle by hash(user) into num_partitions--> whole partitions
              --vectorised code--> sequences/, examples/split=.../ (one file per partition)

The catalogue's ids are broadcast once, and nothing is mapped over single users. A shuffle costs
5-15 seconds on a small machine whatever the size. Tasks write files named after their fragment
or partition, so a task that Ray runs twice replaces its own file.
"""

from __future__ import annotations

import json
import logging
import sys
import zlib
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from karma_ray.artifacts import absolute, exists, join, locked, read_table, write_table
from karma_ray.cluster.session import connect
from karma_ray.data.fragments import Fragment, read_fragment
from karma_ray.data.preparation import (
    add_up,
    build_partition,
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


def ensure_prepared(data_uri: str, config: PrepareConfig) -> PreparedData:
    """What stands at `data_uri` if it was prepared with `config` from these files, else prepare.

    A source that came pre-split (its prepared.json says `"presplit": true`) is taken as it is.
    Raises InputError when the data would have to be prepared anew and have no events.
    """
    require_data(data_uri)
    if (data := _standing(data_uri, config)) is not None:
        return data
    config.check()
    with locked(join(absolute(data_uri), "prepare")):
        if _standing(data_uri, config) is None:  # another process may have been faster
            _prepare_into(data_uri, config, data_uri)
    return PreparedData.load(data_uri)


def _standing(data_uri: str, config: PrepareConfig) -> PreparedData | None:
    """What stands at `data_uri` where it need not be prepared anew."""
    has_events = exists(join(data_uri, "events"))
    if exists(join(data_uri, "prepared.json")):
        data = PreparedData.load(data_uri)
        changed = {} if data.facts.get("presplit") else differences(data.facts, config)
        if data.facts.get("presplit") or (not changed and not has_events):
            return data
        if not has_events:
            listed = ", ".join(f"prepare.{k} {a!r} -> {b!r}" for k, (a, b) in changed.items())
            raise InputError("--data", data_uri, f"has no events to prepare anew with {listed}")
        if not changed and data.facts.get("input") == fingerprint(data_uri):
            return data
    elif not has_events:
        raise InputError("--data", data_uri, "has neither prepared.json nor events/")
    return None


def prepare(
    data_uri: str, config: PrepareConfig, out: str | None = None, progress: bool = True
) -> dict[str, Any]:
    """Write sequences/, examples/, quarantine/ and prepared.json to `out` (default: the data
    folder) and return the content of the latter. `progress` shows Ray Data's bars
    on a terminal.

    Raises InputError, TooManyBadRows (the quarantine is kept to look at) and LeakError.
    """
    config.check()
    require_data(data_uri)
    with locked(join(absolute(out or data_uri), "prepare")):
        return _prepare_into(data_uri, config, out or data_uri, progress)


def _prepare_into(
    data_uri: str, config: PrepareConfig, out: str, progress: bool = True
) -> dict[str, Any]:
    source, target = absolute(data_uri), absolute(out)
    remove(join(target, WORK))
    try:
        return _prepare(source, target, config, progress)
    finally:
        remove(join(target, WORK))


def partition_of(user_ids: pa.ChunkedArray, num_partitions: int) -> pa.ChunkedArray:
    """Partition [rows] int32 of each user, by a hash that is the same in every process."""
    coded = pc.dictionary_encode(pa.concat_arrays([pa.array([], pa.string()), *user_ids.chunks]))
    users = coded.dictionary.to_pylist()
    of_user = pa.array([zlib.crc32(user.encode()) % num_partitions for user in users], pa.int32())
    return pa.chunked_array([of_user.take(coded.indices)])


def _prepare(source: str, target: str, config: PrepareConfig, progress: bool) -> dict[str, Any]:
    manifest = read_data_manifest(source)
    fragments = event_fragments(source)
    num_rows = sum(fragment.num_rows for fragment in fragments)
    item_ids, item_counts = read_catalogue(source, target, config.max_bad_share)
    work = join(target, WORK)
    connect()
    _show_progress(progress)
    LOG.info("prepare: checking %d event rows against %d items", num_rows, len(item_ids))
    clean = _checked_events(source, work, fragments, item_ids, config)
    quarantined = count_quarantined(target, num_rows, config.max_bad_share)
    cutoffs = cutoffs_of([read_table(join(work, "click_times"))], config, manifest)
    LOG.info("prepare: shuffling by user into %d partitions", config.num_partitions)
    built = clean.groupby("partition", num_partitions=config.num_partitions).map_groups(
        write_partition,
        batch_format="pyarrow",
        fn_kwargs={"work": work, "cutoffs": cutoffs, "config": config},
    )
    rows = [*read_table(join(work, "counts")).to_pylist(), *built.take_all()]
    for leak in filter(None, (row["leak"] for row in rows)):
        raise LeakError(leak)
    counts = add_up([item_counts, *(json.loads(row["counts"]) for row in rows)])
    facts = make_facts(config, cutoffs, counts, quarantined, manifest)
    facts["input"] = fingerprint(source)
    if target != source:
        facts["data"] = source
    publish(target, facts)
    return facts


def _checked_events(
    source: str, work: str, fragments: list[Fragment], item_ids: pa.Array, config: PrepareConfig
) -> ray.data.Dataset:
    """Clean events of all fragments, held in the object store: both later steps need them."""
    described = [asdict(fragment) for fragment in fragments]
    return (
        ray.data.from_items(described, override_num_blocks=len(described))
        .map_batches(
            _check_fragment,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={
                "folder": join(source, "events"),
                "work": work,
                "item_ids": ray.put(item_ids),
                "num_partitions": config.num_partitions,
            },
        )
        .materialize()
    )


def _check_fragment(
    batch: pa.Table, folder: str, work: str, item_ids: ray.ObjectRef, num_partitions: int
) -> pa.Table:
    """Task: one fragment of events -> its clean rows; what else it finds is written beside."""
    (described,) = batch.to_pylist()
    fragment = Fragment(**described)
    table = read_fragment(folder, fragment.path, fragment.row_group)
    known = ray.get(item_ids)
    checked = check_events(table, known, fragment.path, fragment.first_row, fragment.order)
    part = f"part-{fragment.order:012d}"
    write_table(checked.quarantine, join(work, "quarantine"), f"events-{part}")
    write_table(click_times(checked.table), join(work, "click_times"), part)
    write_table(_report(checked.counts), join(work, "counts"), part)
    partition = partition_of(checked.table["user_id"], num_partitions)
    return checked.table.append_column("partition", partition)


def write_partition(
    group: pa.Table, work: str, cutoffs: Cutoffs, config: PrepareConfig
) -> pa.Table:
    """Task: the clean events of one partition of users -> its files; returns its counts.

    A leak is returned, not raised: Ray Data hands on the text of a task's exception and not
    its type, and nothing is published while there is one.
    """
    part = f"part-{group['partition'][0].as_py():05d}"
    try:
        built = build_partition(group.drop_columns(["partition"]), cutoffs, config)
    except LeakError as leak:
        return _report({}, str(leak))
    write_table(built.sequences, join(work, "sequences"), part)
    for split, table in built.examples.items():
        write_table(table, join(work, "examples", f"split={split}"), part)
    return _report(built.counts)


def _report(counts: dict[str, int], leak: str | None = None) -> pa.Table:
    return pa.table({"counts": [json.dumps(counts)], "leak": pa.array([leak], pa.string())})


def _show_progress(progress: bool) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = progress and sys.stderr.isatty()
    context.print_on_execution_start = False
    # Otherwise every execution says that it ended, and that it shows no bar.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)

"""Preparation of events into sequences and examples, in two passes over parts and partitions.

    parts of events/  --check-->  clean rows by user, rejected rows, clicks per time (work folder)
                      --cutoffs, from the clicks of all parts-->
    partitions of users --build--> sequences/, examples/split=.../ (one file per partition)

No process holds more than one part or one partition. What a task has finished is kept in the work
folder until the job has ended, so a killed job goes on where it was (data/prepare_work.py). Tasks
run in this process by default, or on Ray (cluster/sharding.py); both write the same bytes.

What prepares is imported where it is used, so that data that are prepared need no polars.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from karma_ray.artifacts import absolute, exists, join, locked
from karma_ray.data.config import PrepareConfig
from karma_ray.data.prepared import (
    PreparedData,
    differences,
    fingerprint,
    read_data_manifest,
    require_data,
)
from karma_ray.data.tasks import RunTasks, Task, run_here
from karma_ray.errors import InputError, LeakError, TooManyBadRows

if TYPE_CHECKING:
    import pyarrow as pa

    from karma_ray.data.event_parts import EventPart, Sizes
    from karma_ray.data.forgotten import Forgotten
    from karma_ray.data.passes import PartCheck, PartitionBuild
    from karma_ray.data.prepare_work import PrepareWork
    from karma_ray.data.splits import Cutoffs

LOG = logging.getLogger(__name__)


def ensure_prepared(data_uri: str, config: PrepareConfig, run: RunTasks = run_here) -> PreparedData:
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
            _prepare_into(data_uri, config, data_uri, run)
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
    data_uri: str, config: PrepareConfig, out: str | None = None, run: RunTasks = run_here,
    sizes: Sizes | None = None, since: str | None = None, forget: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Write sequences/, examples/, quarantine/ and prepared.json to `out` (default: `data_uri`).

    With `since` (YYYY-MM-DD) the files of earlier days must be as they were when they were last
    prepared. The rows of the users `forget` are left out, now and whenever `out` is prepared again.
    Returns the content of prepared.json. Raises InputError, TooManyBadRows (the quarantine is
    kept for inspection) and LeakError.
    """
    config.check()
    require_data(data_uri)
    _check_day(since)
    target = out or data_uri
    with locked(join(absolute(target), "prepare")):
        return _prepare_into(data_uri, config, target, run, sizes, since, forget)


def _prepare_into(
    data_uri: str, config: PrepareConfig, out: str, run: RunTasks,
    sizes: Sizes | None = None, since: str | None = None, forget: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    from karma_ray.data.event_parts import Sizes
    from karma_ray.data.forgotten import Forgotten
    from karma_ray.data.prepare_work import PrepareWork
    from karma_ray.data.staging import WORK

    source, target = absolute(data_uri), absolute(out)
    work = PrepareWork(join(target, WORK))
    forgotten = Forgotten.of(target, forget)
    job = _Preparation(source, target, work, config, run, sizes or Sizes(), forgotten)
    try:
        facts = job.prepare(since)
    except (InputError, TooManyBadRows, LeakError):
        work.close()  # with this input there is nothing to go on with
        raise
    work.close()
    return facts


def _check_day(since: str | None) -> None:
    try:
        fine = since is None or date.fromisoformat(since).isoformat() == since
    except ValueError:
        fine = False
    if not fine:
        raise InputError("--since", since, "is not a day as in 2024-05-01")


@dataclass(frozen=True)
class _Preparation:
    """What one preparation reads, writes and is configured by."""

    source: str
    target: str
    work: PrepareWork
    config: PrepareConfig
    run: RunTasks
    sizes: Sizes
    forgotten: Forgotten

    def prepare(self, since: str | None) -> dict[str, Any]:
        """Check the parts, choose the cutoffs, build the partitions and publish the tables."""
        from karma_ray.data.event_parts import list_parts
        from karma_ray.data.passes import PartCheck, PartitionBuild
        from karma_ray.data.preparation import add_up, catalogue_ids, held_out_ids, make_facts
        from karma_ray.data.staging import Staging, add_reasons, read_catalogue
        from karma_ray.data.user_rows import num_partitions

        config, work = self.config, self.work
        manifest, events = read_data_manifest(self.source), join(self.source, "events")
        work.open([config.num_partitions, config.max_user_events])
        parts = list_parts(events, self.sizes, work.known_parts(), since)
        work.write_parts(parts)
        items = read_catalogue(self.source, with_categories=config.hold_out > 0)
        staging = Staging(self.target, work, events, items.quarantine)
        staging.check_items(items.counts["item_rows"], config.max_bad_share)
        item_ids = catalogue_ids(items.table)
        work.match_catalogue(item_ids)
        num_rows, cells = sum(part.num_rows for part in parts), sum(part.cells for part in parts)
        small = cells <= self.sizes.here_cells
        LOG.info("prepare: checking %d event rows against %d items", num_rows, len(item_ids))
        check = PartCheck(events, work, item_ids, config, self.forgotten)
        checked = self._check(check, parts, small)
        staging.check_events(parts, checked, config.max_bad_share)
        cutoffs = _cutoffs(work, parts, checked, config, manifest)
        partitions = num_partitions(config.num_partitions, cells, self.sizes.partition_cells)
        LOG.info("prepare: splitting by user into %d partitions", partitions)
        held_out, of_held_out = held_out_ids(items.table, config)
        key = self.forgotten.key
        build = PartitionBuild(work, parts, partitions, cutoffs, config, held_out, key)
        reports = self._build(build, small)
        left_out = self.forgotten.counts(facts["forgotten"] for facts in checked)
        done = [facts["counts"] for facts in [*checked, *reports]]
        counts = add_up([items.counts, of_held_out, *done, left_out])
        quarantined = add_reasons(checked, items.quarantine)
        facts = make_facts(config, cutoffs, counts, quarantined, manifest)
        facts["input"] = fingerprint(self.source)
        if self.target != self.source:
            facts["data"] = self.source
        staging.publish(parts, facts)
        return facts

    def _check(
        self, check: PartCheck, parts: Sequence[EventPart], small: bool
    ) -> list[dict[str, Any]]:
        """Check the parts that are not finished; returns the facts of all."""
        key = self.forgotten.key
        missing = [
            part for part, facts in zip(parts, self.work.facts(parts), strict=True)
            if facts is None or facts["forgotten_key"] != key
        ]  # fmt: skip
        if len(missing) < len(parts):
            LOG.info("prepare: %d of %d parts are checked", len(parts) - len(missing), len(parts))
        self._do(check, missing, small, "parts of the log")
        found = [facts for facts in self.work.facts(parts) if facts is not None]
        assert len(found) == len(parts)
        return found

    def _build(self, build: PartitionBuild, small: bool) -> list[dict[str, Any]]:
        """Build the partitions that are not finished; returns the reports of all."""
        self.work.open_build(build.key())
        done = self.work.reports()
        missing = [partition for partition in range(build.num_partitions) if partition not in done]
        self._do(build, missing, small, "partitions of users")
        reports = [report for _, report in sorted(self.work.reports().items())]
        for leak in filter(None, (report["leak"] for report in reports)):
            raise LeakError(leak)
        assert len(reports) == build.num_partitions
        return reports

    def _do(self, task: Task, inputs: Sequence[Any], small: bool, what: str) -> None:
        hide = True if small else None  # None hides it where no terminal is
        with tqdm(total=len(inputs), desc=what, disable=hide) as bar:
            for _ in self.run(task, inputs, small):
                bar.update()


def _cutoffs(
    work: PrepareWork, parts: Sequence[EventPart], checked: Sequence[dict[str, Any]],
    config: PrepareConfig, manifest: dict[str, Any],
) -> Cutoffs:  # fmt: skip
    from karma_ray.data.click_times import DAY, cutoffs_by_day

    def times(first: int, end: int) -> pa.Table:
        there = [
            part for part, facts in zip(parts, checked, strict=True)
            if any(first <= day * DAY < end for day, _, _ in facts["days"])
        ]  # fmt: skip
        return work.times(there, first, end)

    return cutoffs_by_day((facts["days"] for facts in checked), times, config, manifest)

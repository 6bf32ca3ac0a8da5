"""Preparing on Ray gives what preparing in memory gives, also when a worker is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from karma_ray.artifacts import read_json, read_table, write_json, write_table
from karma_ray.cluster.sharding import ensure_prepared, prepare, run_on_ray
from karma_ray.data.config import PrepareConfig
from karma_ray.data.event_parts import Sizes, list_parts
from karma_ray.data.passes import PartCheck, PartitionBuild
from karma_ray.data.preparation import Prepared, prepare_tables
from karma_ray.data.prepare_work import PrepareWork
from karma_ray.data.prepared import PreparedData
from karma_ray.data.schema import ITEMS
from karma_ray.data.splits import Cutoffs, to_microseconds
from karma_ray.data.tasks import Task
from karma_ray.errors import InputError, TooManyBadRows
from karma_ray.runs import preparation
from tests.data.logs import at, event, events_table, items_table, random_events

CONFIG = PrepareConfig(max_history=6, num_hard_negatives=3)
ON_RAY = Sizes(part_cells=1500, here_cells=0)
"""Three parts of `shop`, none of which is prepared in this process."""


def shop(folder: Path) -> tuple[str, Prepared]:
    """A data folder of two event files in three row groups, with bad rows; and its preparation."""
    bad = [event(None, 3, ["i1"]), event("u1", 3, ["i2", "gone"], ["i2", "i5"])]
    events = pa.concat_tables([random_events(seed=11), events_table(bad)])
    extra = pa.Table.from_pylist([{"item_id": "i0", "title": "a double"}], schema=ITEMS)
    items = pa.concat_tables([items_table(60), extra])
    (folder / "events").mkdir(parents=True)
    pq.write_table(events.slice(0, 200), folder / "events" / "a.parquet", row_group_size=120)
    pq.write_table(events.slice(200), folder / "events" / "b.parquet")
    write_table(items, str(folder / "items"))
    write_json({"kind": "data", "query_source": "real"}, str(folder / "manifest.json"))
    return str(folder), prepare_tables(events, items, CONFIG)


def hour(hours: float) -> int:
    return to_microseconds(at(hours), "hour")


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of all tables in a folder."""
    found = sorted(folder.rglob("*.parquet"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def rows_of(table: pa.Table) -> list[str]:
    return sorted(str(row) for row in table.to_pylist())


@pytest.mark.ray
def test_partitions_do_not_change_a_row(tmp_path: Path, ray_cluster: None) -> None:
    uri, whole = shop(tmp_path / "data")
    for partitions, out in ((1, None), (3, str(tmp_path / "elsewhere"))):
        config = PrepareConfig(max_history=6, num_hard_negatives=3, num_partitions=partitions)
        facts = preparation.prepare(uri, config, out, run_on_ray, ON_RAY)
        data = PreparedData.load(out or uri)
        assert data.facts == facts
        assert rows_of(data.sequences()) == rows_of(whole.sequences)
        for split, table in whole.examples.items():
            assert rows_of(data.examples(split)) == rows_of(table)
        for name in ("counts", "quarantined", "valid_start", "test_start"):
            assert facts[name] == whole.facts[name]
        assert data.catalog().num_items == 60
    rejected = read_table(f"{uri}/quarantine").to_pylist()
    places = {(Path(row["source_file"]).name, row["row"]) for row in rejected}
    last = pq.read_metadata(tmp_path / "data" / "events" / "b.parquet").num_rows - 1
    assert places == {("b.parquet", last - 1), ("b.parquet", last), ("part-00000.parquet", 60)}
    assert not (tmp_path / "data" / "prepare-work").exists()


@pytest.mark.ray
def test_partitions_hold_the_same_categories_out(tmp_path: Path, ray_cluster: None) -> None:
    uri, _ = shop(tmp_path / "data")
    events = pa.concat_tables([pq.read_table(f"{uri}/events/{name}.parquet") for name in "ab"])
    kinds = pa.array([f"kind {n % 7}" for n in range(60)])
    items = items_table(60).drop_columns(["category"]).append_column("category", kinds)
    write_table(items, f"{uri}/items")
    config = PrepareConfig(max_history=6, num_hard_negatives=3, num_partitions=3, hold_out=0.3)
    whole = prepare_tables(events, items, config)
    facts = preparation.prepare(uri, config, None, run_on_ray, ON_RAY)
    assert rows_of(PreparedData.load(uri).sequences()) == rows_of(whole.sequences)
    assert facts["counts"] == whole.facts["counts"]
    assert facts["counts"]["held_out_categories"] == 2


@dataclass(frozen=True)
class KilledOnce:
    """Kills the process of the first task that it does, in the middle of it."""

    task: Task
    marker: str

    def __call__(self, part: Any) -> None:
        self.task(part)
        if not os.path.exists(self.marker):
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
def test_a_killed_worker_loses_nothing_and_does_nothing_twice(
    tmp_path: Path, ray_cluster: None
) -> None:
    uri, _ = shop(tmp_path / "data")
    killed: list[str] = []

    def run(task: Task, inputs: Sequence[Any], small: bool) -> Iterable[None]:
        killed.append(str(tmp_path / f"killed-{len(killed)}"))
        return run_on_ray(KilledOnce(task, killed[-1]), inputs, small)

    facts = preparation.prepare(uri, CONFIG, str(tmp_path / "out"), run, ON_RAY)
    assert len(killed) == 2 and all(map(os.path.exists, killed))  # one in each pass
    assert facts == prepare(uri, CONFIG, str(tmp_path / "here"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "here")


def test_data_are_prepared_anew_only_when_something_changed(tmp_path: Path) -> None:
    uri, _ = shop(tmp_path / "data")
    written = tmp_path / "data" / "prepared.json"
    ensure_prepared(uri, CONFIG)
    first = written.stat().st_mtime_ns
    ensure_prepared(uri, CONFIG)
    assert written.stat().st_mtime_ns == first
    ensure_prepared(uri, PrepareConfig(max_history=5, num_hard_negatives=3))
    again = written.stat().st_mtime_ns
    assert again > first
    (tmp_path / "data" / "events" / "a.parquet").unlink()
    data = ensure_prepared(uri, PrepareConfig(max_history=5, num_hard_negatives=3))
    assert written.stat().st_mtime_ns > again
    assert data.facts["counts"]["event_rows"] < 400
    (tmp_path / "data" / "events").rename(tmp_path / "gone")
    assert ensure_prepared(uri, PrepareConfig(max_history=5, num_hard_negatives=3)) == data


def test_too_many_bad_events_stop_and_leave_the_old_tables(tmp_path: Path) -> None:
    uri, _ = shop(tmp_path / "data")
    prepare(uri, CONFIG)
    before = read_json(f"{uri}/prepared.json")
    bad = events_table([event(None, 1, ["i1"])] * 400)
    pq.write_table(bad, tmp_path / "data" / "events" / "c.parquet")
    with pytest.raises(TooManyBadRows, match=r"events: 402 of .*empty user_id: 401.*quarantine"):
        prepare(uri, CONFIG)
    assert read_json(f"{uri}/prepared.json") == before
    assert read_table(f"{uri}/quarantine").num_rows == 403


def test_a_leak_found_in_a_task_reaches_the_caller(tmp_path: Path) -> None:
    uri, _ = shop(tmp_path / "data")
    (part, *_) = parts = list_parts(f"{uri}/events", Sizes())
    work = PrepareWork(str(tmp_path / "work"))
    PartCheck(f"{uri}/events", work, items_table(60)["item_id"].combine_chunks(), CONFIG)(part)
    crossed = Cutoffs(valid_start=hour(150), test_start=hour(50))
    PartitionBuild(work, parts[:1], 4, crossed, CONFIG)(1)
    assert "a page is trained on and evaluated" in work.reports()[1]["leak"]
    assert not (tmp_path / "work" / "build" / "sequences").exists()
    right = Cutoffs(valid_start=hour(150), test_start=hour(175))
    PartitionBuild(work, parts[:1], 4, right, CONFIG)(1)
    assert work.reports()[1]["leak"] is None
    assert (tmp_path / "work" / "build" / "sequences").exists()


def test_wrong_input_stops_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--data: .*nowhere' does not exist"):
        prepare(str(tmp_path / "nowhere"), CONFIG)
    uri, _ = shop(tmp_path / "data")
    events = tmp_path / "data" / "events"
    table = pq.read_table(events / "b.parquet").drop_columns(["clicked_item_ids"])
    pq.write_table(table, events / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet: column: 'clicked_item_ids' is missing"):
        prepare(uri, CONFIG)
    (events / "c.parquet").unlink()
    write_table(items_table(0), f"{uri}/items")
    with pytest.raises(InputError, match="the catalogue is empty"):
        prepare(uri, CONFIG)


def test_pre_split_data_are_taken_as_they_are(tmp_path: Path) -> None:
    uri = str(tmp_path)
    with pytest.raises(InputError, match="neither"):
        ensure_prepared(uri, CONFIG)
    write_json({"presplit": True, "prepare": None}, f"{uri}/prepared.json")
    assert ensure_prepared(uri, CONFIG).facts["presplit"]
    write_json({"prepare": {"max_history": 7}}, f"{uri}/prepared.json")
    with pytest.raises(InputError, match=r"prepare\.max_history 7 -> 6"):
        ensure_prepared(uri, CONFIG)

"""Preparation part by part: sizes, kills, days, limits and forgotten people."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from karma_ray.artifacts import read_table, write_json, write_table
from karma_ray.data import passes
from karma_ray.data.config import PrepareConfig
from karma_ray.data.event_parts import EventPart, Sizes, list_parts
from karma_ray.data.forgotten import read_user_ids
from karma_ray.data.prepared import PreparedData
from karma_ray.data.reading import NO_FILE, NO_GROUP
from karma_ray.data.schema import EVENTS, TIME
from karma_ray.data.tasks import Task, run_here
from karma_ray.errors import InputError, TooManyBadRows
from karma_ray.node_cache import upload
from karma_ray.runs.preparation import prepare
from tests.cluster.stores import BUCKET, running_store
from tests.data.damage import spoil
from tests.data.logs import START, event, events_table, items_table, random_events

CONFIG = PrepareConfig(max_history=6, num_hard_negatives=3, num_partitions=2)
SMALL = Sizes(part_cells=1_000, partition_cells=1_000)


def log() -> pa.Table:
    """Events in the order of time, some of them bad."""
    bad = [event(None, 3, ["i1"]), event("u1", 170, ["i2", "gone"], ["i2", "i5"])]
    return pa.concat_tables([random_events(seed=21), events_table(bad)]).sort_by("timestamp")


def write_log(folder: Path, events: pa.Table, rows: int = 60) -> str:
    """A data folder with two files, and `rows` rows in a row group."""
    (folder / "events").mkdir(parents=True)
    first = events.num_rows // 3
    pq.write_table(events[:first], folder / "events" / "part-0.parquet", row_group_size=rows)
    pq.write_table(events[first:], folder / "events" / "part-1.parquet", row_group_size=rows)
    write_table(items_table(60), str(folder / "items"))
    return str(folder)


def write_days(folder: Path, events: pa.Table, first: int, end: int) -> None:
    """Write days first <= day < end of January 2024, a file each."""
    days = [time.day for time in events["timestamp"].to_pylist()]
    for day in range(first, end):
        rows = events.filter(pa.array([each == day for each in days]))
        target = folder / "events" / f"day=2024-01-{day:02d}"
        target.mkdir(parents=True)
        pq.write_table(rows, target / "log.parquet")


def files_of(folder: Path | str) -> dict[str, bytes]:
    """The content of all tables in a folder but for the work folder."""
    found = sorted(Path(folder).rglob("*.parquet"))
    names = {str(path.relative_to(folder)): path for path in found}
    return {name: path.read_bytes() for name, path in names.items() if "work" not in name}


class Recorded:
    """Runs tasks in this process, and records their inputs."""

    def __init__(self) -> None:
        self.inputs: list[list[Any]] = []

    def __call__(self, task: Task, inputs: Sequence[Any], small: bool) -> Iterable[None]:
        self.inputs.append(list(inputs))
        return run_here(task, inputs)


def test_how_the_input_is_divided_changes_no_byte_of_the_output(tmp_path: Path) -> None:
    events = random_events(seed=22)  # in no order of time, with equal times
    outs = [prepare(write_log(tmp_path / "data-0", events, 1000), CONFIG, sizes=SMALL)]
    for number, (rows, cells) in enumerate([(60, 1 << 22), (60, 500), (7, 900)], 1):
        data = write_log(tmp_path / f"data-{number}", events, rows)
        sizes = Sizes(part_cells=cells, partition_cells=1_000)
        outs.append(prepare(data, CONFIG, sizes=sizes))
    assert len(list_parts(f"{tmp_path}/data-3/events", Sizes(part_cells=900))) > 5
    for number, facts in enumerate(outs):
        assert facts["counts"] == outs[0]["counts"]
        windows = files_of(tmp_path / f"data-{number}" / "sequences")
        assert len(windows) == 8  # 2 * 2^2
        assert windows == files_of(tmp_path / "data-0" / "sequences")
        examples = files_of(tmp_path / f"data-{number}" / "examples")
        assert examples == files_of(tmp_path / "data-0" / "examples")


KILLED = """
import importlib, os, signal, sys
from karma_ray.runs.preparation import prepare
from tests.runs.test_preparation import CONFIG, SMALL
data, out, module, name, count = sys.argv[1:]
owner = importlib.import_module(module)
inner, calls = getattr(owner, name), []
def call(*arguments, **named):
    inner(*arguments, **named)
    calls.append(None)
    if len(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, call)
prepare(data, CONFIG, out, sizes=SMALL)
"""
"""Dies directly after a function was called so many times."""


@pytest.mark.parametrize(
    ("module", "name", "count", "checked", "built"),
    [
        ("ordered_rows", "write_bytes", 3, 2, 0),  # rows of a part are written, facts not
        ("passes", "write_table", 11, None, 3),  # in the fourth partition
        ("staging", "move", 1, None, 0),  # sequences/ is replaced, examples/ not yet
    ],
)
def test_a_killed_job_goes_on_and_loses_nothing(
    tmp_path: Path, module: str, name: str, count: int, checked: int | None, built: int
) -> None:
    data, out = write_log(tmp_path / "data", log()), str(tmp_path / "out")
    parts = len(list_parts(f"{data}/events", SMALL))
    call = [sys.executable, "-c", KILLED, data, out, f"karma_ray.data.{module}", name, str(count)]
    died = subprocess.run(call, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert died.returncode == -9, died.stderr
    assert not Path(out, "prepared.json").exists()
    run = Recorded()
    facts = prepare(data, CONFIG, out, run, SMALL)
    assert [len(inputs) for inputs in run.inputs] == [parts - (checked or parts), 8 - built]
    assert facts == prepare(data, CONFIG, str(tmp_path / "once"), sizes=SMALL)
    assert files_of(out) == files_of(tmp_path / "once")
    assert not Path(out, "prepare-work").exists()


def test_new_days_are_added_without_checking_old_ones_and_equal_a_full_rebuild(
    tmp_path: Path,
) -> None:
    data, out, events = tmp_path / "data", str(tmp_path / "out"), log()
    write_table(items_table(60), f"{data}/items")
    write_days(data, events, 1, 7)
    prepare(str(data), CONFIG, out)
    write_days(data, events, 7, 10)
    pq.write_table(events[:0], data / "events" / "day=2024-01-02" / "empty.parquet")
    with pytest.raises(InputError, match=r"--since: '2024-01-08' is after .*day=2024-01-07"):
        prepare(str(data), CONFIG, out, since="2024-01-08")
    run = Recorded()
    facts = prepare(str(data), CONFIG, out, run, since="2024-01-07")
    assert [part.day for part in run.inputs[0]] == [f"2024-01-0{day}" for day in (7, 8, 9)]
    assert facts == prepare(str(data), CONFIG, str(tmp_path / "full"))
    assert files_of(out) == files_of(tmp_path / "full")
    assert PreparedData.load(out).facts == facts
    with pytest.raises(InputError, match=r"--since: 'May' is not a day"):
        prepare(str(data), CONFIG, out, since="May")
    plain = write_log(tmp_path / "plain", events)
    with pytest.raises(InputError, match=r"needs events/day=YYYY-MM-DD/"):
        prepare(plain, CONFIG, since="2024-01-01")


def test_a_store_has_what_a_disk_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, events = tmp_path / "data", log()
    write_table(items_table(60), f"{data}/items")
    write_days(data, events, 1, 7)
    with running_store(monkeypatch):
        there = f"s3://{BUCKET}/log"
        upload(data, there)
        prepare(there, CONFIG)
        write_days(data, events, 7, 10)
        upload(data / "events" / "day=2024-01-09", f"{there}/events/day=2024-01-09")
        run = Recorded()
        facts = prepare(there, CONFIG, None, run, since="2024-01-09")
        assert [part.day for part in run.inputs[0]] == ["2024-01-09"]
        for day in (7, 8):
            (data / "events" / f"day=2024-01-0{day}" / "log.parquet").unlink()
        assert facts["counts"] == prepare(str(data), CONFIG)["counts"]
        assert PreparedData.load(there).sequences() == PreparedData.load(str(data)).sequences()


def test_an_old_day_is_checked_again_when_an_item_that_it_named_appears(tmp_path: Path) -> None:
    data, out, events = tmp_path / "data", str(tmp_path / "out"), log()
    write_table(items_table(60), f"{data}/items")
    write_days(data, events, 1, 10)
    prepare(str(data), CONFIG, out)
    new = {"item_id": ["gone", "new"], "title": ["back", "never shown"]}
    write_table(pa.table(new), f"{data}/items", "part-00001")
    run = Recorded()
    prepare(str(data), CONFIG, out, run)
    assert [part.day for part in run.inputs[0]] == ["2024-01-08"]  # where "gone" was clicked
    Path(data, "items", "part-00001.parquet").unlink()
    run = Recorded()
    facts = prepare(str(data), CONFIG, out, run)
    assert len(run.inputs[0]) == 9  # an item left: nobody knows which days named it
    assert facts == prepare(str(data), CONFIG, str(tmp_path / "full"))
    assert files_of(out) == files_of(tmp_path / "full")


def test_forgotten_people_leave_every_table_for_good(tmp_path: Path) -> None:
    data, out, events = tmp_path / "data", tmp_path / "out", log()
    write_table(items_table(60), f"{data}/items")
    write_days(data, events, 1, 10)
    prepare(str(data), CONFIG, str(out))
    listed = tmp_path / "names.txt"
    listed.write_text("u1\nu3\n\nnobody\n")
    run = Recorded()
    facts = prepare(str(data), CONFIG, str(out), run, forget=read_user_ids(str(listed)))
    mine = pc.is_in(events["user_id"], value_set=pa.array(["u1", "u3"]))
    names = ("forgotten_users", "forgotten_rows", "forgotten_not_found")
    assert [facts["counts"].pop(name) for name in names] == [2, pc.sum(mine).as_py(), 1]
    others = tmp_path / "others"
    write_table(items_table(60), f"{others}/items")
    write_days(others, events.filter(pc.invert(mine)), 1, 10)
    expected = prepare(str(others), CONFIG)
    assert facts["counts"] == expected["counts"] and facts["test_start"] == expected["test_start"]
    for table in ("sequences", "examples"):
        assert files_of(out / table) == files_of(others / table)
    assert "u1" not in str(read_table(f"{out}/quarantine").to_pylist())
    for path in (out / "prepare-work" / "rows").iterdir():
        users = set(pa.ipc.open_file(path).read_all()["user_id"].to_pylist())
        assert users and not users & {"u1", "u3"}
    again = prepare(str(data), PrepareConfig(max_history=5), str(out))
    assert again["counts"]["forgotten_users"] == 2  # without naming them again
    assert "u1" not in set(PreparedData.load(str(out)).sequences()["user_id"].to_pylist())


def test_a_list_of_forgotten_people_must_name_somebody(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--forget-users: .*does not exist"):
        read_user_ids(str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(InputError, match="names no user"):
        read_user_ids(str(tmp_path / "empty.txt"))


def test_a_user_with_too_many_events_keeps_the_newest(tmp_path: Path) -> None:
    rows = [event("robot", n, [f"i{n % 50}"]) for n in range(60)] + [event("u", 1, ["i1"])]
    config = PrepareConfig(max_history=100, max_user_events=20, valid_share=0.0, test_share=0.0)
    for number, size in enumerate((1000, 9)):
        data = write_log(tmp_path / f"data-{number}", events_table(rows), size)
        facts = prepare(data, config, sizes=SMALL)
        assert facts["counts"]["events_beyond_cap"] == 40
        windows = PreparedData.load(data).sequences().to_pylist()
        clicked = {row["user_id"]: row["item_ids"] for row in windows}
        assert clicked == {"robot": [f"i{n % 50}" for n in range(40, 60)], "u": ["i1"]}


def robot_log(robot: int, others: int) -> pa.Table:
    """A user of `robot` events between users of 4 each, in no order of time."""
    user = np.repeat(np.arange(others), 4)
    user = np.concatenate([np.full(robot, others), user])
    order = np.random.default_rng(0).permutation(len(user))
    seconds = (START.timestamp() + np.random.default_rng(1).permutation(len(user))) * 1e6
    clicked = pa.array([f"i{n}" for n in range(50)]).take(pa.array(order % 50))
    columns = {
        "user_id": pa.array([f"u{n}" for n in range(others)] + ["robot"]).take(pa.array(user)),
        "timestamp": pa.array(seconds.astype(np.int64)).cast(TIME),
        "clicked_item_ids": pa.ListArray.from_arrays(
            pa.array(np.arange(len(user) + 1, dtype=np.int32)), clicked
        ),
    }
    empty = {f.name: pa.nulls(len(user), f.type) for f in EVENTS if f.name not in columns}
    return pa.table({**columns, **empty}).select(EVENTS.names).cast(EVENTS).take(pa.array(order))


def test_a_user_of_a_hundred_thousand_events_is_no_more_work_than_the_cap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    robot, others, cap, parts = 100_000, 1_000, 1_000, 26
    log = robot_log(robot, others)
    (tmp_path / "events").mkdir()
    for number in range(parts):
        rows = log[number * 4_000 : number * 4_000 + 4_000]
        pq.write_table(rows, tmp_path / "events" / f"part-{number:02d}.parquet")
    write_table(items_table(60), str(tmp_path / "items"))
    held: list[int] = []
    build = passes.build_partition

    def counted(clean: pa.Table, *arguments: Any) -> Any:
        held.append(clean.num_rows)
        return build(clean, *arguments)

    monkeypatch.setattr(passes, "build_partition", counted)
    monkeypatch.setattr(passes, "PARTS_AT_ONCE", 4)
    config = PrepareConfig(
        max_history=9, max_user_events=cap, valid_share=0.0, test_share=0.0, num_partitions=2
    )
    facts = prepare(str(tmp_path), config, sizes=Sizes(part_cells=20_000, partition_cells=50_000))
    assert facts["counts"]["events_beyond_cap"] == robot - cap
    assert facts["counts"]["users"] == others + 1
    assert len(held) > 4 and max(held) <= passes.CAPS_HELD * cap  # each part has kept 1,000 rows
    windows = PreparedData.load(str(tmp_path)).sequences().filter(pc.field("user_id") == "robot")
    trained = pc.sum(pc.list_flatten(windows["loss_mask"])).as_py()
    assert trained == cap and pc.max(pc.list_value_length(windows["item_ids"])).as_py() == 10
    times = pc.unique(pc.list_flatten(windows["timestamps"]))
    mine = log.filter(pc.field("user_id") == "robot")["timestamp"].to_pylist()
    assert set(times.to_pylist()) == set(sorted(mine)[-cap:])


def test_parts_follow_row_groups_and_cells(tmp_path: Path) -> None:
    data = write_log(tmp_path / "data", log(), 50)
    parts = list_parts(f"{data}/events", Sizes(part_cells=1_500))
    assert sum(part.num_rows for part in parts) == log().num_rows
    second = [part for part in parts if part.file == "part-1.parquet"]
    assert [part.groups[0] for part in second[1:]] == [part.groups[1] for part in second[:-1]]
    assert all(part.cells <= 1_500 for part in parts)
    whole = list_parts(f"{data}/events", Sizes())
    assert [part.file for part in whole] == ["part-0.parquet", "part-1.parquet"]
    assert sum(part.cells for part in whole) == sum(part.cells for part in parts)
    assert isinstance(whole[0], EventPart) and whole[0].day is None


def test_damaged_files_cost_their_rows_alone(tmp_path: Path) -> None:
    events = log()
    write_log(tmp_path, events)
    sound, broken = write_log(tmp_path / "sound", events), write_log(tmp_path / "broken", events)
    spoil(Path(broken, "events", "part-1.parquet"), 1)
    cut = Path(broken, "events", "cut.parquet")
    cut.write_bytes(Path(sound, "events", "part-0.parquet").read_bytes()[:50])
    config = dataclasses.replace(CONFIG, max_bad_share=0.5)
    whole, facts = prepare(sound, config, sizes=SMALL), prepare(broken, config, sizes=SMALL)
    assert facts["counts"]["event_rows"] == whole["counts"]["event_rows"]
    assert facts["quarantined"][NO_GROUP] == 60 and facts["quarantined"][NO_FILE] == 1
    rows = read_table(f"{broken}/quarantine").to_pylist()
    told = {row["reason"]: (row["source_file"], row["row"]) for row in rows}
    assert told[NO_GROUP] == (f"{broken}/events/part-1.parquet", 60)
    assert told[NO_FILE] == (str(cut), None)
    # As if the lost rows had never been there.
    first = events.num_rows // 3
    kept = pa.concat_tables([events[: first + 60], events[first + 120 :]])
    without = write_log(tmp_path / "without", kept)
    same = prepare(without, config, sizes=SMALL)
    assert facts["valid_start"] == same["valid_start"]
    for table in ("sequences", "examples"):
        assert read_table(f"{broken}/{table}").equals(read_table(f"{without}/{table}"))
    with pytest.raises(TooManyBadRows, match=r"files cannot be read whole.*the rows are in"):
        prepare(broken, dataclasses.replace(CONFIG, max_bad_share=0.01), sizes=SMALL)


def test_nothing_is_left_of_a_preparation_that_was_refused(tmp_path: Path) -> None:
    data = write_log(tmp_path / "data", log())
    plan = {"valid_start": "2025-01-01", "test_start": "2024-01-01"}
    write_json(plan, f"{data}/manifest.json")
    with pytest.raises(InputError, match="lies after"):
        prepare(data, CONFIG)
    assert not Path(data, "prepare-work").exists()

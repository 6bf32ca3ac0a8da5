"""Logs that are read in batches: the same bytes, bounded memory, whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from karma_ray.artifacts import read_manifest, read_table
from karma_ray.data.importers import output
from karma_ray.data.importers.delimited import DelimitedReader
from karma_ray.data.importers.import_work import ImportSizes
from karma_ray.data.importers.log_passes import divide
from karma_ray.data.importers.long import import_long
from karma_ray.data.importers.text_blocks import stream_blocks
from karma_ray.data.tasks import Task
from karma_ray.errors import InputError

ITEMS = "item_id,title\n" + "".join(f"{n},thing {n}\n" for n in range(9))


def write_log(folder: Path, num_rows: int, seed: int = 0) -> tuple[str, str]:
    """Rows in no order: each page's rows lie anywhere, some are bad, some have several lines."""
    generator = np.random.default_rng(seed)
    lines = []
    for row in range(num_rows):
        user, page, item = generator.integers(0, (7, 40, 9))
        query = ["lamp", '"red\nshoe"', '"big, lamp"', '15" tv', ""][page % 5]
        time = "never" if row % 17 == 5 else 1_700_000_000 + page
        rank, clicked = generator.integers(0, (4, 2))
        lines.append(f"u{user},{time},{query},{item},{clicked},{rank},{page % 3 or ''}")
    lines[3] += ",one field more"
    (folder / "items.csv").write_text(ITEMS)
    header = "user_id,timestamp,query,item_id,clicked,position,impression_id\n"
    content = (header + "\n".join(lines) + "\n").encode()
    (folder / "log.csv").write_bytes(content.replace(b"u6,", b"\xff6,", 1))
    return str(folder / "log.csv"), str(folder / "items.csv")


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def sizes_of(number: int) -> ImportSizes:
    return ImportSizes(number, 10 * number, 10 * number, max(10, number))


@pytest.mark.parametrize("impressions", [True, False])
def test_neither_blocks_nor_partitions_show_in_what_is_written(
    impressions: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, items = write_log(tmp_path, 600)
    if not impressions:
        text = Path(log).read_bytes().replace(b",impression_id", b",other", 1)
        Path(log).write_bytes(text)
    written = []
    monkeypatch.setattr(output, "ROWS_PER_PART", 50)
    for number, size in enumerate((1 << 24, 4_000, 100)):
        out = tmp_path / f"out-{number}"
        manifest = import_long(log, str(out), items=items, sizes=sizes_of(size))
        written.append(contents(out))
    assert manifest["quarantined"] == {
        "unparsable timestamp": 34, "not UTF-8": 1, "not as many fields as the header": 1,
    }  # fmt: skip
    assert written[0] == written[1] == written[2]


def test_rows_of_a_page_may_lie_anywhere_in_the_log(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = [
        (f"u{user}", 1_700_000_000 + int(time), f"q{query}", str(item), bool(item % 2))
        for user, time, query, item in generator.integers(0, (5, 6, 2, 9), (400, 4))
    ]
    expected: dict[tuple[str, int, str], list[str]] = {}
    for user, time, query, item, _ in rows:
        page = expected.setdefault((user, time, query), [])
        page += [item] * (item not in page)
    schema = ["user_id", "timestamp", "query", "item_id", "clicked"]
    pl.DataFrame(rows, schema, orient="row").write_csv(tmp_path / "log.csv")
    (tmp_path / "items.csv").write_text(ITEMS)
    import_long(
        str(tmp_path / "log.csv"), str(tmp_path / "out"), items=str(tmp_path / "items.csv"),
        sizes=sizes_of(300),
    )  # fmt: skip
    found = {
        (p["user_id"], int(p["timestamp"].timestamp()), p["query"]): p["exposed_item_ids"]
        for p in read_table(str(tmp_path / "out" / "events")).to_pylist()
    }
    assert found == expected
    first = {
        key: place for place, key in reversed(list(enumerate((r[0], r[1], r[2]) for r in rows)))
    }
    assert list(found) == sorted(found, key=lambda key: (key[1], first[key]))


@pytest.mark.parametrize("quotes", ["auto", "csv", "text"])
def test_a_reader_of_blocks_reads_what_a_reader_of_all_lines_does(quotes: str) -> None:
    generator = np.random.default_rng(1)
    kinds = ["a,b", '"a,1",b', '"open,b', 'close",b', 'x" y,b', "one", '"a""b",c', '",b']
    lines = pl.Series("line", [kinds[n] for n in generator.integers(0, len(kinds), 200)])
    rows = np.arange(200)
    whole = DelimitedReader("x,y", ",", quotes).read(lines, rows)
    for size in (1, 7, 50):
        reader = DelimitedReader("x,y", ",", quotes)
        parts = [
            reader.read(lines.slice(at, size), rows[at : at + size], last=at + size >= 200)
            for at in range(0, 200, size)
        ]
        assert pl.concat([part.frame for part in parts]).equals(whole.frame)
        assert pl.concat([part.rejected for part in parts]).equals(whole.rejected)
        assert sum(part.joined for part in parts) == whole.joined


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blocks_hold_the_lines_of_the_file(encoding: str, end: str, tmp_path: Path) -> None:
    lines = ["größe", "", "x" * 100, "é,ü"]
    (tmp_path / "a.csv").write_bytes(end.join(lines).encode(encoding))
    stated = "latin-1" if encoding == "latin-1" else None
    for size in (1, 30, 1 << 20):
        blocks = list(stream_blocks(str(tmp_path / "a.csv"), stated, size))
        assert [line for block in blocks for line in block.lines] == lines
        firsts = np.cumsum([0, *(len(block.lines) for block in blocks)])
        assert [block.first for block in blocks] == firsts[:-1].tolist()


MEASURED = """
import resource, sys
from karma_ray.data.importers import output
from karma_ray.data.importers.import_work import ImportSizes
from karma_ray.data.importers.long import import_long
output.ROWS_PER_PART = 2_000
log, items, out = sys.argv[1:]
import_long(log, out, items=items, sizes=ImportSizes(1 << 20, 1 << 21, 1 << 21, 500))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(ITEMS)
    peaks, sizes = [], []
    for num_rows in (8_000, 80_000):
        rows = pl.int_range(num_rows, eager=True)
        log = pl.DataFrame(
            {"user_id": (rows * 7919) % (num_rows // 20), "timestamp": 1_700_000_000 + rows // 3,
             "query": "a red lamp for the desk of a child, " * 30, "item_id": rows % 9,
             "clicked": rows % 4 == 0}
        )  # fmt: skip
        log.write_csv(tmp_path / "log.csv")
        sizes.append((tmp_path / "log.csv").stat().st_size >> 10)
        out = str(tmp_path / f"out-{num_rows}")
        arguments = [str(tmp_path / "log.csv"), str(tmp_path / "items.csv"), out]
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 0.4 * (sizes[1] - sizes[0]), (peaks, sizes)


KILLED = """
import os, signal, sys
from karma_ray.data.importers import log_passes, output
from karma_ray.data.importers.import_work import ImportSizes
from karma_ray.data.importers.long import import_long
place, count, log, items, out = sys.argv[1:]
module, name = {
    "rows": (log_passes, "write_ordered"), "pages": (log_passes, "pages_of"),
    "events": (log_passes, "event_counts"),
    "write": (output, "write_table"), "move": (output, "move"), "remove": (output, "_remove"),
}[place]
whole, left = getattr(module, name), [int(count)]
def dying(*arguments, **named):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*arguments, **named)
setattr(module, name, dying)
output.ROWS_PER_PART = 50
import_long(log, out, items=items, sizes=ImportSizes(2_000, 4_000, 4_000, 10))
"""


@pytest.mark.parametrize(
    ("place", "count"),
    [("rows", 1), ("pages", 1), ("events", 2), ("write", 2), ("remove", 4), ("move", 1),
     ("move", 3)],
)  # fmt: skip
def test_a_killed_import_leaves_nothing_that_looks_whole_and_is_repeated_once(
    place: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "ROWS_PER_PART", 50)
    log, items = write_log(tmp_path, 300)
    import_long(log, str(tmp_path / "expected"), items=items)
    out = tmp_path / "out"
    other = tmp_path / "other"
    other.mkdir()
    import_long(write_log(other, 50, seed=1)[0], str(out), items=items)
    before = read_manifest(str(out))["data_hash"]
    arguments = [place, str(count), log, items, str(out)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    if (out / "manifest.json").exists():  # then it is whole, and the old one
        assert read_manifest(str(out))["data_hash"] == before
        assert place not in ("move",)
    else:
        assert place in ("move", "remove")
    import_long(log, str(out), items=items)
    assert contents(out) == contents(tmp_path / "expected")


@dataclass
class Counting:
    """Runs tasks here and counts them, until none is left to do."""

    left: int = 1_000
    done: Counter[str] = field(default_factory=Counter)

    def __call__(self, task: Task, inputs: Sequence[Any], small: bool) -> Iterator[None]:
        for one in inputs:
            if not self.left:
                raise ConnectionError("the cluster is gone")
            task(one)
            self.left -= 1
            self.done[type(task).__name__] += 1
            yield


def write_logs(folder: Path) -> tuple[str, str]:
    """Four files, of which one has a row that is not UTF-8."""
    log, items = write_log(folder, 400)
    header, *lines = Path(log).read_bytes().splitlines(keepends=True)
    (folder / "log").mkdir()
    for number in range(4):
        content = header + b"".join(lines[number * 100 : number * 100 + 130])
        (folder / "log" / f"{number}.csv").write_bytes(content)
    return str(folder / "log"), items


def test_an_interrupted_import_goes_on_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, items = write_logs(tmp_path)
    monkeypatch.setattr(output, "ROWS_PER_PART", 50)
    sizes, whole = ImportSizes(partition_bytes=10_000, range_pages=10), Counting()
    import_long(log, str(tmp_path / "expected"), items=items, sizes=sizes, run=whole)
    assert whole.done["ReadFile"] == 4 and min(whole.done.values()) > 1
    out, done = str(tmp_path / "out"), Counter[str]()
    for _ in range(sum(whole.done.values()) - 1):
        once = Counting(left=1)
        with pytest.raises(ConnectionError):
            import_long(log, out, items=items, sizes=sizes, run=once)
        done += once.done
    last = Counting()
    import_long(log, out, items=items, sizes=sizes, run=last)
    assert done + last.done == whole.done and sum(last.done.values()) == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    log, items = write_logs(tmp_path)
    out, interrupted = str(tmp_path / "out"), Counting(left=5)
    with pytest.raises(ConnectionError):
        import_long(log, out, items=items, run=interrupted)
    assert interrupted.done == {"ReadFile": 4, "FoldUsers": 1}
    changed = Path(log, "2.csv")
    changed.write_bytes(changed.read_bytes() + b"u1,1700000000,lamp,3,1,0,\n")
    Path(log, "0.csv").unlink()
    again = Counting()
    import_long(log, out, items=items, run=again)
    assert again.done == {"ReadFile": 1, "FoldUsers": 1, "WriteEvents": 1}
    import_long(log, str(tmp_path / "expected"), items=items)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_files_are_read_again_if_their_columns_would_be_others(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(ITEMS)
    folder = tmp_path / "log" / "query=lamp"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.csv").write_text("user_id,timestamp,item_id,clicked\nu,9,1,1\n")
    arguments: dict[str, Any] = {"items": str(tmp_path / "items.csv")}
    for src in (folder, folder.parent):  # the folder names a column of the second only
        with pytest.raises(ConnectionError):
            import_long(str(src), str(tmp_path / "out"), **arguments, run=Counting(left=3))
    whole = import_long(str(folder.parent), str(tmp_path / "out"), **arguments, run=Counting(2))
    assert whole["query_source"] == "real"
    with pytest.raises(ConnectionError):
        import_long(str(folder), str(tmp_path / "out"), **arguments, run=Counting(left=3))
    (folder / "0.csv").write_text("user_id,timestamp,item_id\nu,9,1\n")
    with pytest.raises(InputError, match=r"0.csv' lacks the column 'clicked'"):
        import_long(str(folder), str(tmp_path / "out"), **arguments)


def test_columns_are_refused_before_a_task_is_run(tmp_path: Path) -> None:
    log, items = write_logs(tmp_path)
    with pytest.raises(InputError, match="--columns clicked: 'buy' is not a column of the file"):
        import_long(
            log, str(tmp_path / "out"), items=items, columns={"clicked": "buy"}, run=Counting(0)
        )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_other_nodes_do_not_reach_is_named(tmp_path: Path) -> None:
    def elsewhere(task: Task, inputs: Sequence[Any], small: bool) -> Iterator[None]:
        yield from (None for _ in inputs)  # whose output lies on the disk of another node

    log, items = write_logs(tmp_path)
    with pytest.raises(InputError, match=r"OUT.*lacks what 4 tasks wrote: all nodes must share"):
        import_long(log, str(tmp_path / "out"), items=items, run=elsewhere)


@pytest.mark.parametrize("range_pages", [1, 40, 1_000])
def test_parts_hold_every_page_once_in_the_order_of_time(range_pages: int) -> None:
    generator = np.random.default_rng(range_pages)
    times = [np.sort(generator.integers(0, 90, size)) for size in (200, 0, 57, 1)]
    times[0][:80] = 7  # pages of one time are in several parts
    samples = [some[: 100 : max(1, range_pages // 32)].tolist() for some in times]
    every = np.sort(np.concatenate(times))
    parts = divide(samples, times, 30, range_pages)
    assert [part.num_rows for part in parts] == [30] * 8 + [18]
    found = []
    for part in parts:
        within = every[(every >= part.start) & (every < part.stop)]
        found.append(within[part.skip : part.skip + part.num_rows])
    assert np.concatenate(found).tolist() == every.tolist()


def test_damage_costs_what_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(ITEMS)
    (tmp_path / "log").mkdir()
    rows = pl.int_range(3_000, eager=True)
    for part in range(6):
        frame = pl.DataFrame({"user_id": rows + 10_000 * part, "timestamp": 1_700_000_000 + rows,
                              "item_id": rows % 9})  # fmt: skip
        frame.write_parquet(tmp_path / "log" / f"{part}.parquet", row_group_size=1_000)
    files = sorted((tmp_path / "log").iterdir())
    cut = files[1].read_bytes()
    files[1].write_bytes(cut[: len(cut) // 2])
    broken = bytearray(files[2].read_bytes())
    broken[8:400] = np.random.default_rng(0).bytes(392)  # pages of the first row group
    files[2].write_bytes(bytes(broken))
    manifest = import_long(
        str(tmp_path / "log"), str(tmp_path / "out"), items=str(tmp_path / "items.csv")
    )
    assert manifest["quarantined"] == {"file cannot be read": 1, "rows cannot be read": 1}
    assert manifest["counts"]["clicks"] == 6 * 3_000 - 3_000 - 1_000
    lost = {row["reason"]: row for row in
            read_table(str(tmp_path / "out" / "quarantine_import")).to_pylist()}  # fmt: skip
    assert lost["file cannot be read"]["source_file"].endswith("1.parquet")
    assert lost["file cannot be read"]["row"] is None and lost["rows cannot be read"]["row"] == 0
    assert '"rows":1000' in lost["rows cannot be read"]["record"]


def test_too_much_damage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(ITEMS)
    (tmp_path / "log").mkdir()
    log = "user_id,timestamp,item_id\n" + "u,1,1\n" * 50
    (tmp_path / "log" / "a.csv").write_text(log)
    (tmp_path / "log" / "b.csv").write_bytes(log.encode() + b"\xff,1,1\n" * 50)
    with pytest.raises(InputError, match=r"50 of 100 lines are not UTF-8; --encoding names"):
        import_long(str(tmp_path / "log"), str(tmp_path / "out"), items=str(tmp_path / "items.csv"))
    assert not (tmp_path / "out").exists()


WIDE = """user_id,item_id,click,follow,like,share,ts
1,1,1,0,0,0,3
1,2,0,0,0,0,3
1,3,0,0,1,0,3
2,4,0,0,0,1,1
2,5,maybe,0,0,0,1
"""


def test_several_kinds_of_feedback_are_one_click(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(WIDE)
    (tmp_path / "items.csv").write_text(ITEMS)
    arguments = (str(tmp_path / "log.csv"), str(tmp_path / "out"))
    columns = {"clicked": "click+like", "purchased": "share", "timestamp": "ts"}
    manifest = import_long(*arguments, items=str(tmp_path / "items.csv"), columns=columns)
    pages = read_table(str(tmp_path / "out" / "events")).to_pylist()
    assert [p["clicked_item_ids"] for p in pages] == [[], ["1", "3"]]
    assert [p["purchased_item_ids"] for p in pages] == [["4"], []]
    assert manifest["quarantined"] == {"unparsable clicked": 1}
    with pytest.raises(InputError, match=r"--columns clicked: 'click\+likes' is not a column"):
        import_long(
            *arguments, items=str(tmp_path / "items.csv"), columns={"clicked": "click+likes"}
        )


def test_a_log_without_times_is_in_the_order_of_its_rows(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(WIDE.replace("maybe", "1"))
    (tmp_path / "items.csv").write_text(ITEMS)
    manifest = import_long(
        str(tmp_path / "log.csv"), str(tmp_path / "out"), items=str(tmp_path / "items.csv"),
        columns={"clicked": "click", "timestamp": "row"},
    )  # fmt: skip
    pages = read_table(str(tmp_path / "out" / "events")).to_pylist()
    order = [(p["user_id"], p["timestamp"].second, p["exposed_item_ids"]) for p in pages]
    assert sorted(order) == [
        ("1", 1, ["1"]), ("1", 2, ["2"]), ("1", 3, ["3"]), ("2", 1, ["4"]), ("2", 2, ["5"]),
    ]  # fmt: skip
    assert any(note.startswith("times are UNKNOWN") for note in manifest["notes"])


def test_rows_that_come_late_are_put_where_their_times_say(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(ITEMS)
    zones = ["2024-03-31T{:02}:{:02}:00Z", "2024-03-31T{:02}:{:02}:00+00:00"]
    lines = [
        f"u{n % 3},{zones[n % 2].format(n // 60, n % 60)},q,{n % 9},{n % 2}" for n in range(120)
    ]
    # The same moments, as a clock in Berlin showed them while it was put forward.
    lines += [
        f"v{n % 3},2024-03-31T{n // 60 + (1 if n < 60 else 2):02}:{n % 60:02}:00"
        f"+0{1 if n < 60 else 2}:00,q,{n % 9},{n % 2}"
        for n in range(120)
    ]
    written = []
    for number, order in enumerate((range(240), np.random.default_rng(0).permutation(240))):
        header = "user_id,timestamp,query,item_id,clicked\n"
        (tmp_path / "log.csv").write_text(header + "\n".join(lines[n] for n in order))
        out = tmp_path / f"out-{number}"
        import_long(str(tmp_path / "log.csv"), str(out), items=str(tmp_path / "items.csv"))
        pages = read_table(str(out / "events")).to_pylist()
        assert [p["timestamp"] for p in pages] == sorted(p["timestamp"] for p in pages)
        written.append({(p["user_id"], p["timestamp"]): p["exposed_item_ids"] for p in pages})
    assert written[0] == written[1] and len(written[0]) == 240
    assert {time for user, time in written[0] if user[0] == "u"} == {
        time for user, time in written[0] if user[0] == "v"
    }


def test_texts_that_are_no_texts_are_set_aside(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(ITEMS + f"10,{'x' * 1_000_001}\n")
    log = f"user_id,timestamp,query,item_id\nu,1,{'y' * 10_001},1\nu,2,lamp,1\n"
    (tmp_path / "log.csv").write_text(log)
    manifest = import_long(
        str(tmp_path / "log.csv"), str(tmp_path / "out"), items=str(tmp_path / "items.csv")
    )
    assert manifest["quarantined"] == {
        "text of more than 1000000 characters": 1, "query of more than 10000 characters": 1,
    }  # fmt: skip
    assert manifest["counts"]["events"] == 1 and manifest["counts"]["items"] == 9

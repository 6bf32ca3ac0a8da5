"""A work folder keeps what is finished, and its table appears whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from karma_ray.artifacts import exists, join, read_table, write_bytes, write_json, write_manifest
from karma_ray.data.work_folder import WorkFolder, open_work, remove_work

ROWS = pa.table({"n": [1, 2]})


@pytest.fixture(params=["local", "store"])
def work(request: pytest.FixtureRequest, tmp_path: Path) -> WorkFolder:
    root = str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"
    folder = WorkFolder(join(root, "target"))
    folder.open("first")
    return folder


def test_parts_are_found_by_the_next_attempt_with_the_same_key_alone(work: WorkFolder) -> None:
    assert work.finished() == {} and work.finished_part("a") is None
    work.write("b", ROWS, {"count": 2})
    work.write("a", None, [0])
    WorkFolder(work.target).open("first")
    assert work.finished() == {"a": [0], "b": {"count": 2}}
    assert work.finished_part("b") == {"count": 2}
    WorkFolder(work.target).open("second")
    assert work.finished() == {}


def test_a_part_without_its_facts_or_its_rows_is_not_finished(work: WorkFolder) -> None:
    work.write("a", ROWS, 1)
    write_bytes(b"torn", join(work.table, "b.parquet"))
    write_json({"has_rows": True, "facts": 1}, join(work.root, "facts", "c.json"))
    assert work.finished() == {"a": 1}


def test_parts_of_an_earlier_input_are_set_aside_and_torn_ones_removed(work: WorkFolder) -> None:
    work.write("a", ROWS, 1)
    work.write("b", ROWS, 2)
    write_bytes(b"torn", join(work.table, "c.parquet"))
    assert work.keep(["a", "b", "c"]) is None
    assert work.keep(["b", "c"]) == join(work.root, "aside")
    assert work.finished() == {"b": 2} and read_table(work.table).equals(ROWS)
    assert read_table(join(work.root, "aside")).equals(ROWS)
    assert work.keep([]) is not None and work.finished() == {}


def test_a_complete_table_takes_the_place_of_an_earlier_one(work: WorkFolder) -> None:
    write_bytes(b"old", join(work.target, "old.parquet"))
    work.write("a", ROWS, 1)
    made = write_manifest(work.table, "numbers")
    work.complete()
    assert read_table(work.target).equals(ROWS) and made["content_hash"]
    assert exists(join(work.target, "manifest.json"))
    assert not exists(join(work.target, "old.parquet")) and not exists(work.root)


def test_nothing_goes_on_with_what_an_interrupted_removal_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, left = str(tmp_path / "work"), tmp_path / "work" / "facts.json"
    open_work(folder, "key")
    write_json(1, str(left))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove_work(folder)
    monkeypatch.undo()
    assert left.exists()
    open_work(folder, "key")
    assert not left.exists()

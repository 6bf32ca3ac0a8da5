from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from karma_ray.artifacts import (
    RunFolder,
    content_hash,
    data_files,
    exists,
    join,
    locked,
    move,
    new_file,
    read_json,
    read_lines,
    read_manifest,
    read_table,
    write_json,
    write_manifest,
    write_table,
)
from karma_ray.errors import InputError

TABLE = pa.table({"item_id": ["a", "b"], "price": [1.0, 2.0]})


@pytest.mark.parametrize("kind", ["path", "uri"])
def test_tables_and_json_come_back_from_paths_and_uris(tmp_path: Path, kind: str) -> None:
    root = str(tmp_path) if kind == "path" else f"memory://{tmp_path.name}"
    write_table(TABLE, join(root, "items"))
    assert read_table(join(root, "items")).equals(TABLE)
    write_json({"b": 1, "a": [None, 2.5]}, join(root, "deep", "facts.json"))
    assert read_json(join(root, "deep", "facts.json")) == {"b": 1, "a": [None, 2.5]}


def test_json_is_replaced_in_one_step_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_json({"n": 1}, str(path))
    write_json({"n": 2}, str(path))
    assert read_json(str(path)) == {"n": 2}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "does not exist"),
        ("{broken", "is not JSON"),
    ],
)
def test_json_that_cannot_be_read_is_an_input_error(
    tmp_path: Path, make: str | None, message: str
) -> None:
    path = tmp_path / "facts.json"
    if make is not None:
        path.write_text(make)
    with pytest.raises(InputError, match=message):
        read_json(str(path))


def test_a_file_whose_writer_fails_stays_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "below" / "file"
    with new_file(str(path)) as sink:
        sink.write(b"old")
    with pytest.raises(RuntimeError), new_file(str(path)) as sink:
        sink.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"


def test_a_folder_without_tables_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_table(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \.parquet file"):
        read_table(str(tmp_path / "empty"))


@pytest.mark.parametrize("kind", ["path", "uri"])
def test_a_folder_is_moved_with_all_that_is_below_it(tmp_path: Path, kind: str) -> None:
    root = str(tmp_path) if kind == "path" else f"memory://{tmp_path.name}/moved"
    write_table(TABLE, join(root, "old", "day=1"))
    write_json("facts", join(root, "old", "facts.json"))
    move(join(root, "old"), join(root, "new"))
    assert not exists(join(root, "old"))
    assert read_json(join(root, "new", "facts.json")) == "facts"
    assert read_table(join(root, "new")).num_rows == 2
    move(join(root, "new", "facts.json"), join(root, "facts.json"))
    assert read_json(join(root, "facts.json")) == "facts"


@pytest.mark.parametrize("kind", ["path", "uri"])
def test_hidden_and_temporary_files_are_no_data(tmp_path: Path, kind: str) -> None:
    root = str(tmp_path / ".home") if kind == "path" else f"memory://{tmp_path.name}/.home"
    for folder in ("t/day=1", "t/.ipynb_checkpoints", "t/_temporary/0", "t"):
        write_table(TABLE, join(root, folder))
    for name in (".part-00000.parquet", "_part.parquet", ".part-00000.parquet.crc"):
        write_json("no table", join(root, "t", name))
    assert read_table(join(root, "t")).num_rows == 4
    assert len(data_files(join(root, "t", "_temporary"), (".parquet",))) == 1, "named on purpose"


def test_a_content_hash_depends_on_names_and_bytes_and_not_on_manifests(tmp_path: Path) -> None:
    def folder(name: str, **files: str) -> str:
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        return str(tmp_path / name)

    first = folder("first", a="1", b="2")
    assert content_hash(first) == content_hash(folder("same", a="1", b="2"))
    assert content_hash(first) != content_hash(folder("bytes", a="1", b="3"))
    assert content_hash(first) != content_hash(folder("names", a="1", c="2"))
    before = content_hash(first)
    Path(first, "part-00000.parquet.123.tmp").write_text("a writer was killed here")
    assert content_hash(first) == before
    manifest = write_manifest(first, "bundle", parents={"items": "x"}, recipe="toy")
    assert manifest["content_hash"] == before == content_hash(first)
    assert read_manifest(first, "bundle") == manifest
    with pytest.raises(InputError, match="choices: index"):
        read_manifest(first, "index")


def test_a_lock_keeps_another_process_out(tmp_path: Path) -> None:
    target = str(tmp_path / "cache" / "warmup")
    ask = (
        "import sys; from filelock import FileLock, Timeout\n"
        "try: FileLock(sys.argv[1]).acquire(timeout=0)\n"
        "except Timeout: print('busy')\n"
        "else: print('free')"
    )

    def other() -> str:
        command = [sys.executable, "-c", ask, f"{target}.lock"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with locked(target):
        assert other() == "busy"
    assert other() == "free"
    with locked("memory://cache/warmup"):
        pass


def test_lines_of_an_absent_file_are_none_at_all(tmp_path: Path) -> None:
    assert list(read_lines(str(tmp_path / "metrics.jsonl"))) == []


def test_latest_follows_the_newest_run(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        RunFolder(str(tmp_path / name)).link_latest()
        assert (tmp_path / "latest").resolve() == tmp_path / name

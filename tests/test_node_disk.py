"""What a node keeps is bounded, and what a living process uses is not taken from it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from karma_ray import node_disk
from karma_ray.artifacts import exists
from karma_ray.errors import InputError
from karma_ray.node_cache import local_copy
from tests.conftest import ROOT

STORE = "memory://node-disk"


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A node that keeps nothing yet, and an empty store."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    fs = fsspec.filesystem("memory")
    if fs.exists("/node-disk"):
        fs.rm("/node-disk", recursive=True)


def _kept(folder: Path) -> list[str]:
    """The copies that this node has, by name."""
    return sorted(path.name for path in folder.glob("karma_ray-node-*/copies/*/*.bin"))


def _fetched(name: str) -> Path:
    if not exists(uri := f"{STORE}/{name}.bin"):
        with fsspec.open(uri, "wb") as sink:
            sink.write(name.encode() * 40_960)
    return Path(local_copy(uri))


def _last_used(copy: Path, day: int) -> None:
    os.utime(copy.parent.with_name(f"{copy.parent.name}.use"), (day * 86_400,) * 2)


def test_what_was_used_longest_ago_goes_when_there_is_no_room(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(node_disk.LIMIT, "0.0001")  # two files and a half
    monkeypatch.setattr(node_disk, "UNUSED_SECONDS", float("inf"))
    monkeypatch.setattr(node_disk, "HOLDS", 1)  # as if each were used by a process of its own
    for day, name in enumerate("abc", 1):
        _last_used(_fetched(name), day)
    assert _kept(node) == ["b.bin", "c.bin"]
    _last_used(_fetched("b"), 4)
    _last_used(_fetched("d"), 5)
    assert _kept(node) == ["b.bin", "d.bin"]
    assert _fetched("c").read_bytes() == b"c" * 40_960  # fetched again
    assert _kept(node) == ["c.bin", "d.bin"]


def test_what_was_not_used_for_a_month_goes_though_there_is_room(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_disk, "HOLDS", 1)
    _last_used(_fetched("a"), 1)
    _fetched("b")
    old = node_disk.node_folder() / "0123-8.tokens.12.tmp"  # of a process that was killed
    old.write_bytes(b"half")
    os.utime(old, (86_400,) * 2)
    _fetched("c")
    assert _kept(node) == ["b.bin", "c.bin"] and not old.exists()


HOLDER = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from karma_ray.node_cache import local_copy
print(local_copy(sys.argv[2]), flush=True)
sys.stdin.read()
"""


def test_what_a_living_process_uses_stays_until_it_is_killed(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(node_disk.LIMIT, "0")
    monkeypatch.setattr(node_disk, "HOLDS", 1)
    (source := node / "source" / "a.bin").parent.mkdir()
    source.write_bytes(b"a")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, node, source.as_uri()], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as user:  # fmt: skip
        assert user.stdout is not None
        assert Path(user.stdout.readline().strip()).read_bytes() == b"a"
        _fetched("b")
        assert _kept(node) == ["a.bin", "b.bin"]
        user.kill()
    _fetched("c")
    assert _kept(node) == ["c.bin"]


def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(node_disk.LIMIT, "half")
    with pytest.raises(InputError, match=r"KARMA_RAY_NODE_GB.*number of GB"):
        _fetched("a")

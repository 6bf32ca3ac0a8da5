"""A node fetches and hashes what lies elsewhere once, and again when it has changed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from karma_ray import node_cache
from karma_ray.artifacts import content_hash, exists, join, write_json, write_manifest
from karma_ray.errors import InputError
from karma_ray.node_cache import (
    checkpoint_hash,
    complete_folder,
    known_hash,
    local_copy,
    upload,
)

STORE = "memory://node-cache"


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A node that has fetched nothing yet, and an empty store."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    fs = fsspec.filesystem("memory")
    if fs.exists("/node-cache"):
        fs.rm("/node-cache", recursive=True)


def _checkpoint(folder: str, text: str = "weights") -> str:
    write_json(text, join(folder, "model", "config.json"))
    write_json([], join(folder, "pooling", "config.json"))
    write_manifest(folder, "checkpoint")
    return folder


def test_a_local_path_and_a_hub_name_are_used_as_they_are(tmp_path: Path) -> None:
    assert local_copy(str(tmp_path)) == str(tmp_path)
    assert local_copy("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = _checkpoint(f"{STORE}/a")
    first = local_copy(source)
    assert content_hash(first) == content_hash(source) == checkpoint_hash(source)
    memory = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(memory, "get_file", lambda *_, **__: pytest.fail("fetched again"))
    assert local_copy(source) == first
    assert local_copy(_checkpoint(f"{STORE}/copy/a")) == first  # the same content


def test_a_part_of_a_checkpoint_comes_with_the_whole() -> None:
    part = Path(local_copy(join(_checkpoint(f"{STORE}/a"), "model")))
    assert (part / "config.json").is_file()
    assert (part.parent / "pooling" / "config.json").is_file()


def test_a_changed_source_is_fetched_again() -> None:
    write_json("first", f"{STORE}/table/facts.json")
    first = local_copy(f"{STORE}/table")
    write_json("other", f"{STORE}/table/facts.json")
    assert content_hash(local_copy(f"{STORE}/table")) != content_hash(first)


def test_what_differs_from_its_manifest_or_is_absent_is_refused() -> None:
    source = _checkpoint(f"{STORE}/a")
    write_json("torn", join(source, "model", "config.json"))
    with pytest.raises(InputError, match=r"other files than its manifest\.json says"):
        local_copy(source)
    with pytest.raises(InputError, match="does not exist"):
        local_copy(f"{STORE}/nowhere")


@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path, remote: bool) -> None:
    uri = f"{STORE}/made" if remote else str(tmp_path / "made")
    with pytest.raises(ZeroDivisionError), complete_folder(uri) as draft:
        _checkpoint(draft)
        raise ZeroDivisionError
    assert not exists(uri)
    with complete_folder(uri) as draft:
        _checkpoint(draft)
    assert content_hash(uri) == content_hash(_checkpoint(str(tmp_path / "again")))


def test_manifests_are_uploaded_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, names = type(fsspec.filesystem("memory")), []
    monkeypatch.setattr(memory, "put_file", lambda _, source, target: names.append(Path(target)))
    upload(Path(_checkpoint(str(tmp_path / "a"))), f"{STORE}/a")
    assert names[-1].name == "manifest.json"
    assert len(names) == 3


def test_a_hash_is_computed_once_and_again_for_a_changed_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file := tmp_path / "items" / "part").parent.mkdir()
    file.write_text("abc")
    os.utime(file, (time.time() - 60,) * 2)
    first = known_hash(str(file.parent))
    assert first == content_hash(str(file.parent))
    with monkeypatch.context() as patch:
        patch.setattr(node_cache, "content_hash", lambda _: pytest.fail("hashed again"))
        assert known_hash(str(file.parent)) == first
    file.write_text("abd")  # as long, and just now
    assert known_hash(str(file.parent)) == content_hash(str(file.parent)) != first

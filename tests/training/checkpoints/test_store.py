"""Committed or incomplete, kept or dropped, retried or given up; one process."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest
import torch
from torch import nn

from karma_ray.artifacts import read_json
from karma_ray.errors import StorageError
from karma_ray.training.checkpoints import outage, store
from karma_ray.training.checkpoints.checkpoint import Progress, load_checkpoint
from karma_ray.training.checkpoints.files import CheckpointFiles
from karma_ray.training.checkpoints.outage import is_transient, reason, retried
from karma_ray.training.checkpoints.store import CheckpointStore


def _model(value: float = 0.0) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 3)
    nn.init.constant_(model.weight, value)
    return model, torch.optim.AdamW(model.parameters())


def _saved(folder: Path, *steps: int, **options: Any) -> CheckpointStore:
    """Checkpoints whose weights are their step."""
    found = CheckpointStore(str(folder), **options)
    for step in steps:
        found.save(*_model(step), Progress(step))
    found.finish()
    return found


def _restored(folder: Path) -> float | None:
    """The step that a new start continues from, as the weights say it."""
    model, optimizer = _model(-1.0)
    progress = CheckpointStore(str(folder)).restore(
        lambda local: load_checkpoint(local, model, optimizer)
    )
    if progress is None:
        return None
    assert model.weight[0, 0].item() == progress.step
    return progress.step


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_the_manifest_lists_every_file_with_size_and_checksum(tmp_path: Path) -> None:
    _saved(tmp_path, 7)
    manifest = read_json(str(tmp_path / "step-0000007/checkpoint.json"))
    assert (manifest["step"], manifest["num_workers"]) == (7, 1)
    files = {path.name for path in (tmp_path / "step-0000007").iterdir()}
    assert files - manifest["files"].keys() == {"checkpoint.json", "done-0.json"}
    for name, facts in manifest["files"].items():
        assert facts["size"] == (tmp_path / "step-0000007" / name).stat().st_size
        assert len(facts["blake2b"]) == 32


@pytest.mark.parametrize("kind", ["model", "optimizer", "state", "random"])
@pytest.mark.parametrize("damage", [_truncate, _flip, os.unlink])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, damage: Callable[[Path], None]
) -> None:
    model, optimizer = _model(1.0)
    kept = CheckpointStore(str(tmp_path))
    kept.save(model, optimizer, Progress(1))
    model(torch.ones(4)).sum().backward()
    optimizer.step()  # so that there are moments to damage
    nn.init.constant_(model.weight, 2.0)
    kept.save(model, optimizer, Progress(2))
    kept.finish()
    damage(next((tmp_path / "step-0000002").glob(f"{kind}*")))
    assert _restored(tmp_path) == 1
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "checkpoint step-0000002 is incomplete" in warning
    assert "next older" in warning


def test_without_its_marker_a_checkpoint_does_not_count(tmp_path: Path) -> None:
    _saved(tmp_path, 1, 2)
    (tmp_path / "step-0000002/checkpoint.json").unlink()
    assert _restored(tmp_path) == 1
    (tmp_path / "step-0000001/checkpoint.json").write_text('{"files"')
    assert _restored(tmp_path) is None


def test_a_folder_that_is_not_there_is_a_fresh_start(tmp_path: Path) -> None:
    assert _restored(tmp_path / "none") is None


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    found = CheckpointStore(str(tmp_path), keep=2, best_metric="HR@50")
    for step, score in enumerate([3.0, 9.0, float("nan"), None, 8.0, 1.0], start=1):
        found.save(*_model(step), Progress(step), score=score)
    found.finish()
    assert _names(tmp_path) == ["step-0000002", "step-0000005", "step-0000006"]
    best = {"checkpoint": "step-0000002", "metric": "HR@50", "value": 9.0}
    assert read_json(str(tmp_path / "best.json")) == best
    # A new start knows it, too.
    again = CheckpointStore(str(tmp_path), keep=1, best_metric="HR@50")
    again.restore(lambda local: load_checkpoint(local, *_model()))
    again.save(*_model(7), Progress(7), score=8.5)
    again.finish()
    assert _names(tmp_path) == ["step-0000002", "step-0000007"]


def test_torn_newer_checkpoints_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    _saved(tmp_path, 1, 2, 3, keep=3)
    for step in (2, 3):
        _flip(next((tmp_path / f"step-000000{step}").glob("model*")))
    found = CheckpointStore(str(tmp_path), keep=2)
    model, optimizer = _model()
    found.restore(lambda local: load_checkpoint(local, model, optimizer))
    found.save(*_model(2), Progress(2))
    found.finish()
    assert "step-0000001" in _names(tmp_path)
    assert _restored(tmp_path) == 2


@contextmanager
def _slow_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writes wait for the event."""
    go, write = threading.Event(), CheckpointFiles.write

    def slow(self: CheckpointFiles, name: str, content: bytes) -> None:
        go.wait(10)
        write(self, name, content)

    monkeypatch.setattr(CheckpointFiles, "write", slow)
    yield go
    go.set()


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, wait = 0.0, CheckpointStore.wait
    monkeypatch.setattr(store.time, "perf_counter", lambda: now)
    with _slow_writes(monkeypatch) as go:

        def waited_for(self: CheckpointStore) -> None:
            nonlocal now
            if self._writer is not None:
                assert self._writer.is_alive()  # nothing was written meanwhile
                now += 3.0
                go.set()
            wait(self)

        found = CheckpointStore(str(tmp_path))
        model, optimizer = _model(1.0)
        found.save(model, optimizer, Progress(1))
        nn.init.constant_(model.weight, 5.0)  # training
        assert not go.is_set() and found.stall_seconds == 0
        monkeypatch.setattr(CheckpointStore, "wait", waited_for)
        found.save(model, optimizer, Progress(2))  # waits: one write at most is in flight
        assert go.is_set() and found.stall_seconds == 3
        monkeypatch.setattr(CheckpointStore, "wait", wait)
        found.finish()
    _flip(next((tmp_path / "step-0000002").glob("model*")))
    assert _restored(tmp_path) == 1


def _failing(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> list[str]:
    """The first `times` writes of weights raise."""
    tries: list[str] = []
    write = CheckpointFiles.write

    def flaky(self: CheckpointFiles, name: str, content: bytes) -> None:
        if "model-" in name:
            tries.append(name)
            if len(tries) <= times:
                raise error
        write(self, name, content)

    monkeypatch.setattr(CheckpointFiles, "write", flaky)
    return tries


def test_a_store_that_is_away_for_a_moment_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = botocore.exceptions.EndpointConnectionError(endpoint_url="http://127.0.0.1:1")
    tries = _failing(monkeypatch, refused, 2)
    found = _saved(tmp_path, 1)
    assert len(tries) == 3
    assert (found.failed, caplog.records) == ([], [])
    assert _restored(tmp_path) == 1


def test_a_checkpoint_that_fails_for_good_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _saved(tmp_path, 1)
    _failing(monkeypatch, OSError(errno.EIO, "s3://KEY:SECRET@bucket/x is away"), 1000)
    found = CheckpointStore(str(tmp_path), patience=0.1)
    found.restore(lambda local: load_checkpoint(local, *_model()))
    found.save(*_model(2), Progress(2))
    found.finish()
    assert found.failed == [2]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "step-0000002 was not saved" in message
    assert "is away" in message
    assert message.endswith("resumed from step-0000001")
    assert "SECRET" not in message
    assert _names(tmp_path) == ["step-0000001"]


@contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: EFBIG from the kernel."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_where_there_is_no_room_the_checkpoint_is_given_up_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = _saved(tmp_path, 1)
    wide = nn.Linear(300, 300)
    tries = _failing(monkeypatch, OSError("never raised"), 0)
    with _file_size_limit(50_000), caplog.at_level(logging.WARNING):
        found.save(wide, torch.optim.AdamW(wide.parameters()), Progress(2))
        found.finish()
    assert len(tries) == 1  # not retried: waiting makes no room
    assert found.failed == [2]
    assert _names(tmp_path) == ["step-0000001"]  # what was half written is gone
    found.save(*_model(3), Progress(3))
    found.finish()
    assert _restored(tmp_path) == 3


def test_a_start_that_was_replaced_commits_nothing(tmp_path: Path) -> None:
    owner = str(tmp_path / "owner.json")
    old = _saved(tmp_path / "steps", 1, owner=owner)
    assert old.is_owner()
    new = CheckpointStore(str(tmp_path / "steps"), owner=owner)
    assert new.is_owner()
    assert not old.is_owner()
    old.save(*_model(2), Progress(2))
    old.finish()
    assert _names(tmp_path / "steps") == ["step-0000001"]


def test_parts_of_an_earlier_start_are_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Worker 1 of a killed start had finished its part; this start's worker 1 never does.
    (tmp_path / "step-0000002").mkdir(parents=True)
    stale = {"start": 1, "files": {}}
    (tmp_path / "step-0000002/done-1.json").write_text(json.dumps(stale))
    from karma_ray.training.checkpoints import checkpoint

    monkeypatch.setattr(checkpoint, "world_size", lambda: 2)
    found = CheckpointStore(str(tmp_path), commit_timeout=0.3)
    found.save(*_model(2), Progress(2))
    found.finish()
    assert found.failed == [2]
    assert _restored(tmp_path) is None


def test_a_folder_nobody_can_write_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="run folder: no access to"):
        CheckpointStore(str(tmp_path / "c"), owner=str(tmp_path / "file" / "owner.json"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (TimeoutError("slow"), True),
        (OSError(errno.EIO, "SlowDown"), True),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="x"), True),
        (botocore.exceptions.ConnectTimeoutError(endpoint_url="x"), True),
        (
            botocore.exceptions.ClientError(
                {"ResponseMetadata": {"HTTPStatusCode": 503}, "Error": {}}, "PutObject"
            ),
            True,
        ),
        (
            botocore.exceptions.ClientError(
                {"ResponseMetadata": {"HTTPStatusCode": 400}, "Error": {}}, "PutObject"
            ),
            False,
        ),
        (botocore.exceptions.NoCredentialsError(), False),
        (PermissionError("AccessDenied"), False),
        (FileNotFoundError("NoSuchBucket"), False),
        (OSError(errno.ENOSPC, "full"), False),
        (ValueError("ours"), False),
    ],
)
def test_only_what_may_pass_is_waited_for(error: Exception, expected: bool) -> None:
    assert is_transient(error) is expected


def test_waiting_grows_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    now = 0.0

    class Clock(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            nonlocal now
            waits.append(timeout or 0.0)
            now += timeout or 0.0
            return False

    def away() -> None:
        raise ConnectionRefusedError("away")

    monkeypatch.setattr(outage.time, "monotonic", lambda: now)
    with pytest.raises(ConnectionRefusedError):
        retried(away, seconds=60, hurried=Clock())
    assert waits[:6] == [0.5, 1, 2, 4, 8, 10]
    assert sum(waits) <= 60
    hurried = Clock()
    hurried.set()
    waits.clear()
    with pytest.raises(ConnectionRefusedError):
        retried(away, hurried=hurried)
    assert waits == []


def test_secrets_in_addresses_are_not_told() -> None:
    assert reason(OSError("s3://KEY:SECRET@b/run gone")) == "OSError: s3://***@b/run gone"
    assert store.step_name(12) == "step-0000012"

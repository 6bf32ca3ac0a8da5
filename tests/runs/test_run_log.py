from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from karma_ray.artifacts import read_lines
from karma_ray.runs import run_log
from karma_ray.runs.run_log import ProgressLine, RunLog, note_start


def _write(run: Path, steps: range, start: int = 0) -> None:
    log = RunLog(str(run), "joint", start)
    for step in steps:
        log.add({"step": step, "seconds": 2.0, "loss/total": 1.0 / step})
    log.close()


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_seconds_add_up_over_a_stage(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 4))
    assert [line["seconds"] for line in read_lines(f"{tmp_path}/metrics.jsonl")] == [2.0, 4.0, 6.0]


def test_resuming_drops_the_lines_after_the_checkpoint(tmp_path: Path) -> None:
    other = RunLog(str(tmp_path), "warmup")
    other.add({"step": 9, "seconds": 1.0})
    other.close()
    _write(tmp_path, range(1, 6))
    _write(tmp_path, range(4, 5), start=3)
    lines = list(read_lines(f"{tmp_path}/metrics.jsonl"))
    found = [(line["stage"], line["step"], line["seconds"]) for line in lines]
    joint = [("joint", step, 2.0 * step) for step in range(1, 5)]
    assert found == [("warmup", 9, 1.0), *joint]


def test_the_progress_line_ends_at_the_last_reported_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ProgressLine(str(tmp_path), "joint", 8):
        _write(tmp_path, range(1, 9))
    shown = capfd.readouterr().err
    assert "8/8" in shown
    assert "loss 0.125" in shown


def test_half_a_line_of_a_killed_process_is_dropped(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 4))
    with open(tmp_path / "metrics.jsonl", "a") as sink:
        sink.write('{"stage": "joint", "st')
    _write(tmp_path, range(4, 6), start=3)
    assert [line["step"] for line in read_lines(f"{tmp_path}/metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_lines_that_cannot_be_written_wait(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = RunLog(str(tmp_path), "joint")
    log.add({"step": 1})
    os.rename(tmp_path / "metrics.jsonl", tmp_path / "aside")
    (tmp_path / "metrics.jsonl").mkdir()  # where root, too, cannot write a file
    with caplog.at_level(logging.WARNING):
        log.add({"step": 2})
        log.add({"step": 3})
    assert len(caplog.records) == 1
    assert "cannot be written yet" in caplog.text
    (tmp_path / "metrics.jsonl").rmdir()
    os.rename(tmp_path / "aside", tmp_path / "metrics.jsonl")
    log.close()
    assert [line["step"] for line in read_lines(f"{tmp_path}/metrics.jsonl")] == [1, 2, 3]


def test_on_an_object_store_the_log_is_one_object_written_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_log, "FLUSH_SECONDS", 0.05)
    run = "memory://log-of-a-run"
    store = fsspec.filesystem("memory")
    write, tries = store.pipe_file, []

    def flaky(path: str, content: bytes) -> None:
        tries.append(path)
        if len(tries) in (2, 3):
            raise ConnectionRefusedError("s3://KEY:SECRET@bucket is away")
        write(path, content)

    monkeypatch.setattr(store, "pipe_file", flaky)
    log = RunLog(run, "joint")
    for step in range(1, 5):
        log.add({"step": step, "seconds": 1.0})  # never waits for the store
        wait_until(lambda step=step: len(tries) >= step)  # its thread may be late
    log.close()
    assert [line["step"] for line in read_lines(f"{run}/metrics.jsonl")] == [1, 2, 3, 4]
    assert len(caplog.records) == 1
    assert "SECRET" not in caplog.text
    again = RunLog(run, "joint", 2)
    again.add({"step": 3, "seconds": 1.0})
    again.close()
    lines = [(line["step"], line["seconds"]) for line in read_lines(f"{run}/metrics.jsonl")]
    assert lines == [(1, 1.0), (2, 2.0), (3, 3.0)]
    store.rm("/log-of-a-run", recursive=True)


def test_the_driver_tells_an_alarm_of_far_away_workers_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def write(step: int, start: int = 0, **more: float) -> None:
        log = RunLog(str(tmp_path), "joint", start)
        log.add({"step": step, "seconds": 1.0, "collapse/mean_cosine_e": 0.97, **more})
        log.close()

    told = {"alarm/mean_cosine_e": 0.9}
    with ProgressLine(str(tmp_path), "joint", 2):
        write(1, **told)
        wait_until(lambda: bool(caplog.messages))
        write(2, start=1)
    assert [m for m in caplog.messages if "collapse alarm at step 1" in m] == caplog.messages
    assert len(caplog.messages) == 1
    caplog.clear()
    with ProgressLine(str(tmp_path), "joint", 3):  # the run goes on
        write(3, start=2)
    assert not caplog.messages
    again = RunLog(str(tmp_path), "joint", 3)
    again.close()
    assert [line["step"] for line in again.earlier] == [1, 2, 3]


def test_lines_before_a_checkpoint_reach_a_store_without_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_log, "FLUSH_SECONDS", 3600.0)
    log = RunLog(run := "memory://log-before-a-checkpoint", "joint")
    log.add({"step": 10, "seconds": 1.0})
    log.flush()
    wait_until(lambda: bool(list(read_lines(f"{run}/metrics.jsonl"))))
    (line,) = read_lines(f"{run}/metrics.jsonl")
    assert line["step"] == 10
    log.close()


def test_every_start_is_noted_with_its_machines(tmp_path: Path) -> None:
    note_start(str(tmp_path), "joint", ["10.0.0.1", "10.0.0.2"])
    (tmp_path / "checkpoints" / "joint" / "step-0000012").mkdir(parents=True)
    note_start(str(tmp_path), "joint", ["10.0.0.3"])
    first, second = read_lines(str(tmp_path / "starts.jsonl"))
    assert (first["stage"], first["step"]) == ("joint", 0)
    assert first["machines"] == ["10.0.0.1", "10.0.0.2"]
    assert (second["step"], second["machines"]) == (12, ["10.0.0.3"])
    assert second["at"] >= first["at"]

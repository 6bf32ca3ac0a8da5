"""What must not end, or falsify, a training: lost processes, stores, disks and numbers.

One short case of each kind runs with every change; `-m fault` is the full matrix, minutes (they
are marked `slow`, too, so that whatever leaves out slow tests leaves them out).
"""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from karma_ray import cli
from karma_ray.artifacts import read_json, read_lines
from karma_ray.cluster.training import run_training
from karma_ray.errors import StorageError
from karma_ray.runs.worker import TrainJob
from karma_ray.training.checkpoints.files import CheckpointFiles
from karma_ray.training.parallel import rank
from karma_ray.training.step import StepOutput
from karma_ray.training.step_state import StepState
from tests.cluster import driver
from tests.cluster import test_training as small
from tests.cluster.stores import BUCKET, Store, running_store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """The linear rows of the small job."""
    return small.write_rows(tmp_path)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An S3 server."""
    with running_store(monkeypatch) as found:
        yield found


# A lost worker.


def _killing_step(marker: str, at: int, model: nn.Module, batch: Any, *_: object) -> StepOutput:
    """The last worker kills itself, as a lost machine would, in its step `at`; once."""
    if rank() == 1:
        with open(marker, "a") as steps:
            steps.write(".")
        if os.path.getsize(marker) == at:
            os.kill(os.getpid(), signal.SIGKILL)
    return small._step(model, batch)


def _assert_survives_a_lost_worker(folder: Path, rows: str, at: int, **changes: Any) -> None:
    def job(run: str, **more: Any) -> TrainJob:
        return small._job(folder / run, rows, steps=16, checkpoint_every=5, **more)

    run_training(job("whole", num_workers=0), progress=False)
    marker = str(folder / "steps")
    cut = replace(job("cut", num_workers=2, **changes), step=partial(_killing_step, marker, at))
    summary = run_training(cut, max_failures=1, progress=False)
    assert summary["steps"] == 16
    # From the newest checkpoint, or the one before it if the kill met it half written.
    again = os.path.getsize(marker) - at
    newest = 5 * ((at - 1) // 5)
    assert again in (16 - newest, 16 - max(0, newest - 5))
    whole, found = small._losses(folder / "whole"), small._losses(folder / "cut")
    assert list(found) == list(range(1, 17))
    assert list(found.values()) == pytest.approx(list(whole.values()), rel=1e-4, abs=1e-6)


@pytest.mark.ray
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(
    ray_cluster: None, tmp_path: Path, rows: str
) -> None:
    _assert_survives_a_lost_worker(tmp_path, rows, 13)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_worker_may_be_killed_at_any_step(
    ray_cluster: None, tmp_path: Path, rows: str, seed: int
) -> None:
    _assert_survives_a_lost_worker(tmp_path, rows, random.Random(seed).randint(1, 16))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.fault
def test_an_elastic_training_goes_on_after_a_kill(
    ray_cluster: None, tmp_path: Path, rows: str
) -> None:
    _assert_survives_a_lost_worker(tmp_path, rows, 8, min_workers=1)


# A lost driver.


def _driver(run: Path, rows: str, workers: int, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.cluster.driver", str(run), rows, str(workers), *flags]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def _reached(run: Path, step: int, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Wait until the log holds the step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(ValueError):  # a line half written
            if max(small._losses(run), default=0) >= step:
                return
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def _assert_survives_a_lost_driver(folder: Path, rows: str, workers: int, kills: list[int]) -> None:
    run_training(driver.job(str(folder / "whole"), rows, 0), progress=False)
    for number, at in enumerate(kills):
        process = _driver(folder / "cut", rows, workers, *(["--resume"] if number else []))
        _reached(folder / "cut", at, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = _driver(folder / "cut", rows, workers, "--resume")
    message = process.communicate(timeout=200)[1].decode()
    assert process.returncode == 0, message
    whole, found = small._losses(folder / "whole"), small._losses(folder / "cut")
    assert list(found) == list(range(1, driver.STEPS + 1))
    if workers <= 1:
        assert found == whole
    assert list(found.values()) == pytest.approx(list(whole.values()), rel=1e-4, abs=1e-6)


def test_a_killed_driver_is_started_again_with_the_same_command(tmp_path: Path, rows: str) -> None:
    _assert_survives_a_lost_driver(tmp_path, rows, 0, [random.Random(0).randint(8, 30)])


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize(("workers", "kills"), [(0, [3, 12, 13, 33]), (1, [12, 27])])
def test_a_driver_may_be_killed_again_and_again(
    tmp_path: Path, rows: str, workers: int, kills: list[int]
) -> None:
    _assert_survives_a_lost_driver(tmp_path, rows, workers, kills)


def test_a_left_over_of_a_killed_driver_stops(tmp_path: Path, rows: str) -> None:
    run = tmp_path / "run"
    old = _driver(run, rows, 0)
    _reached(run, 6, old)
    run_training(driver.job(str(run), rows, 0), resume=True, progress=False)
    message = old.communicate(timeout=60)[1].decode()
    assert old.returncode == 1
    assert "TakenOver" in message
    assert list(small._losses(run)) == list(range(1, driver.STEPS + 1))


# A store that goes away.


def _leaves(
    store: Store, at: int, seconds: float, model: nn.Module, step: int, state: StepState
) -> StepState:
    """The store goes away after step `at`, once."""
    if step == at and not store.outages:
        store.go_away(seconds)
    return state


def _assert_survives_an_outage(store: Store, folder: Path, rows: str, seconds: float) -> None:
    run = f"s3://{BUCKET}/run"
    plain = driver.job(str(folder / "whole"), rows, 0)
    run_training(plain, progress=False)
    step = partial(driver.slow_step, (seconds + 4) / driver.STEPS)
    job = replace(plain, run=run, step=step, before_step=partial(_leaves, store, 9, seconds))
    summary = run_training(job, progress=False)
    assert store.outages == 1
    assert (summary["steps"], summary["failed_checkpoints"]) == (driver.STEPS, 0)
    lines = [line for line in read_lines(f"{run}/metrics.jsonl") if line["stage"] == "joint"]
    losses = {line["step"]: line["loss/square"] for line in lines}
    assert losses == small._losses(folder / "whole")
    files = CheckpointFiles(f"{run}/checkpoints/joint")
    assert files.steps() == [driver.STEPS - 5, driver.STEPS]
    assert all(files.has_marker(step) for step in files.steps())


def test_a_store_that_goes_away_for_seconds_costs_nothing(
    store: Store, tmp_path: Path, rows: str, caplog: pytest.LogCaptureFixture
) -> None:
    _assert_survives_an_outage(store, tmp_path, rows, 3)
    assert "secret" not in caplog.text


@pytest.mark.slow
@pytest.mark.fault
def test_a_store_that_goes_away_for_a_while_costs_nothing(
    store: Store, tmp_path: Path, rows: str
) -> None:
    _assert_survives_an_outage(store, tmp_path, rows, 20)


def test_a_run_on_a_store_is_resumed_from_its_newest_whole_checkpoint(
    store: Store, tmp_path: Path, rows: str
) -> None:
    whole = driver.job(str(tmp_path / "whole"), rows, 0)
    run_training(whole, progress=False)
    run = f"s3://{BUCKET}/cut"
    calls = iter(range(100))

    def cut(model: nn.Module, batch: Any, *_: object) -> StepOutput:
        if next(calls) == 23:
            raise KeyboardInterrupt
        return small._step(model, batch)

    with pytest.raises(KeyboardInterrupt):
        run_training(replace(whole, run=run, step=cut), progress=False)
    files = CheckpointFiles(f"{run}/checkpoints/joint")
    assert files.steps() == [15, 20]
    name = next(path for path in files.fs.find(f"{files.path}/step-0000020") if "model-" in path)
    files.fs.pipe_file(name, b"torn")
    run_training(replace(whole, run=run), resume=True, progress=False)
    lines = [line for line in read_lines(f"{run}/metrics.jsonl") if line["stage"] == "joint"]
    losses = {line["step"]: line["loss/square"] for line in lines}
    assert losses == small._losses(tmp_path / "whole")


def _with_environment(values: dict[str, str], build: Any) -> nn.Module:
    """`build()` in a worker that was started before the store was."""
    os.environ.update(values)
    model: nn.Module = build()
    return model


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.fault
def test_ray_workers_outlive_an_outage(
    ray_cluster: None, store: Store, tmp_path: Path, rows: str
) -> None:
    plain = driver.job(str(tmp_path / "whole"), rows, 0)
    run_training(plain, progress=False)
    run = f"s3://{BUCKET}/ray"
    job = replace(
        driver.job(run, rows, 2, 0.6),
        run=run,
        build=partial(_with_environment, store.environment, plain.build),
    )

    def leave() -> None:
        while CheckpointFiles(f"{run}/checkpoints/joint").steps() == []:
            time.sleep(0.5)
        store.go_away(20)

    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    summary = run_training(job, progress=False)
    assert (store.outages, summary["failed_checkpoints"]) == (1, 0)
    lines = [line for line in read_lines(f"{run}/metrics.jsonl") if line["stage"] == "joint"]
    assert [line["step"] for line in lines] == list(range(1, driver.STEPS + 1))


# A full disk.


@contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of `size`; skips where mounting is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(
    disk: Path, logged: pytest.LogCaptureFixture, model: nn.Module, step: int, state: StepState
) -> StepState:
    """From step 12 to step 22 nothing more goes onto the disk.

    Checkpoints are written in the background: that of step 10 is awaited before, and the two that
    fail (of steps 15 and 20) are awaited before there is room again.
    """
    if step == 12:
        _wait(lambda: CheckpointFiles(f"{disk}/run/checkpoints/joint").has_marker(10))
        with suppress(OSError), open(disk / "filler", "wb", buffering=0) as sink:
            while True:
                sink.write(bytes(4096))
    if step == 22:
        _wait(lambda: len(_lost(logged)) == 2)
        (disk / "filler").unlink()
    return state


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _lost(logged: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in logged.records]
    return [message for message in messages if "was not saved" in message]


# TensorBoard's own thread ends with its file.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_checkpoints_but_not_the_training(
    tmp_path: Path, rows: str, caplog: pytest.LogCaptureFixture
) -> None:
    with _small_disk(tmp_path / "disk", "1m") as disk, caplog.at_level(logging.WARNING):
        job = driver.job(str(disk / "run"), rows, 0)
        summary = run_training(
            replace(job, before_step=partial(_fill, disk, caplog)), progress=False
        )
        assert summary["failed_checkpoints"] == 2  # of steps 15 and 20
        files = CheckpointFiles(f"{disk}/run/checkpoints/joint")
        assert files.steps() == [driver.STEPS - 5, driver.STEPS]
        # The log has no hole: its lines waited.
        assert list(small._losses(disk / "run")) == list(range(1, driver.STEPS + 1))
    lost = _lost(caplog)
    assert len(lost) == 2
    assert "No space left" in lost[0]
    assert "resumed from step-0000010" in lost[0]


def test_only_the_final_weights_end_the_run(
    tmp_path: Path, rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints/joint").mkdir(parents=True)
    (run / "checkpoints/joint/final").touch()  # no folder can be made here

    def main(argv: list[str] | None) -> None:
        run_training(driver.job(str(run), rows, 0), resume=True, progress=False)

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: final weights: no access to ")
    with pytest.raises(StorageError, match="final weights"):
        main(None)


# A number that is none.


def test_one_bad_number_ends_the_run_in_one_line_and_leaves_the_checkpoint(
    tmp_path: Path, rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = iter(range(100))

    def poisoned(model: nn.Module, batch: Any, *_: object) -> StepOutput:
        inputs, target = batch
        if next(calls) == 12:
            inputs = inputs.clone()
            inputs[0, 0] = torch.nan
        return small._step(model, (inputs, target))

    run = tmp_path / "run"
    job = driver.job(str(run), rows, 0)

    def main(argv: list[str] | None) -> None:
        run_training(replace(job, step=poisoned), progress=False)

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: loss/square is not finite at step 13; the batch was saved to ")
    assert Path(line.rsplit(" ", 1)[1], "batch.safetensors").exists()
    assert read_json(f"{run}/checkpoints/joint/step-0000010/checkpoint.json")["step"] == 10
    run_training(job, resume=True, progress=False)
    run_training(driver.job(str(tmp_path / "whole"), rows, 0), progress=False)
    assert small._losses(run) == small._losses(tmp_path / "whole")

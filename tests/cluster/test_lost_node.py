"""A machine of the cluster is lost: an elastic training goes on with what is left."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from karma_ray.cluster.training import run_training
from tests.cluster import driver
from tests.cluster import test_training as small

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def _node(folder: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """One `ray start --block` with a CPU; killed with all its processes at the end."""
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus", "1",
               "--object-store-memory", str(128 * 2**20), *flags]  # fmt: skip
    with open(folder / f"node{len(list(folder.glob('node*')))}.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a node and everything it started, as a machine that is gone."""
    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(process.pid)
        for one in [*found.children(recursive=True), found]:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
    process.wait()


def _workers(run: Path) -> list[int]:
    return [int(line) for line in Path(f"{run}.workers").read_text().split()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(condition: object, process: subprocess.Popen[bytes], seconds: float, what: str) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(ValueError, OSError):  # a line half written; not there yet
            if condition():
                return
        assert process.poll() is None, what
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds} s")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.fault
def test_an_elastic_training_goes_on_without_a_lost_machine(tmp_path: Path) -> None:
    rows = small.write_rows(tmp_path)
    run_training(driver.job(str(tmp_path / "whole"), rows, 0), progress=False)
    whole = small._losses(tmp_path / "whole")
    address = f"127.0.0.1:{(port := _free_port())}"
    run, temp = tmp_path / "cut", Path(f"/tmp/kr-{port}")  # sockets need a short path
    environment = {**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
    os.environ["RAY_AUTH_MODE"] = "disabled"
    try:
        with (
            _node(tmp_path, "--head", "--port", str(port), "--include-dashboard", "false",
                  "--node-ip-address", "127.0.0.1", "--temp-dir", str(temp)) as head,
        ):  # fmt: skip
            _wait(lambda: socket.create_connection(("127.0.0.1", port), 1).close() is None,
                  head, 60, "the head starts")  # fmt: skip
            with _node(tmp_path, "--address", address) as other:
                _wait(lambda: "Ray runtime started" in (tmp_path / "node1.log").read_text(),
                      other, 60, "the node joins")  # fmt: skip
                command = [sys.executable, "-m", "tests.cluster.driver", str(run), rows, "2",
                           "--elastic"]  # fmt: skip
                training = subprocess.Popen(command, cwd=ROOT, env=environment)
                try:
                    _wait(lambda: max(small._losses(run), default=0) >= 12, training, 180,
                          "step 12")  # fmt: skip
                    assert _workers(run)[-1] == 2
                    _kill(other)
                    assert training.wait(300) == 0
                finally:
                    training.kill()
    finally:
        os.environ.pop("RAY_AUTH_MODE", None)
        shutil.rmtree(temp, ignore_errors=True)
    found = small._losses(run)
    assert list(found) == list(whole)
    assert list(found.values()) == pytest.approx(list(whole.values()), rel=1e-4, abs=1e-6)
    assert _workers(run)[-1] == 1

"""Nodes of a cluster on one machine, which can be lost, and which may each have disks of their own.

A node with its own disks runs in a mount namespace in which some folders are empty: what another
node or the test writes there does not exist for it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from karma_ray.serving.process import free_port as free_port

ROOT = Path(__file__).resolve().parents[2]
OWN_MOUNTS = ["unshare", "--mount", *(() if os.getuid() == 0 else ("--user", "--map-root-user"))]


@contextmanager
def node(
    log: Path,
    *flags: str,
    hidden: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """One `ray start --block` with a CPU; killed with all its processes at the end.

    In it, the `hidden` folders are empty and its own.
    """
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus", "1",
               "--object-store-memory", str(128 * 2**20), *flags]  # fmt: skip
    if hidden:
        mounts = [f"mount -t tmpfs tmpfs '{folder}'" for folder in hidden]
        command = [*OWN_MOUNTS, "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh", *command]
    with open(log, "wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=sink, start_new_session=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
    try:
        yield process
    finally:
        kill(process)


def as_head(port: int, temp: Path) -> list[str]:
    """Return the flags of a head node on loopback; `temp` needs a short path."""
    return ["--head", "--port", str(port), "--include-dashboard", "false",
            "--node-ip-address", "127.0.0.1", "--temp-dir", str(temp)]  # fmt: skip


def need_own_disks() -> None:
    """Skip the test where a process may not mount disks of its own."""
    command = [*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nodes cannot have disks of their own here: {error}")


def start_on(
    node: subprocess.Popen[bytes], environment: Mapping[str, str], *command: str
) -> subprocess.Popen[bytes]:
    """Start a command of Python on the disks of a node."""
    join = ["nsenter", "--target", str(node.pid), "--mount"]
    join += [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
    return subprocess.Popen(
        [*join, f"--wd={ROOT}", sys.executable, *command], env={**os.environ, **environment}
    )


def disk_of(node: subprocess.Popen[bytes], folder: Path) -> Path:
    """Return the path under which this process sees a folder of a node."""
    return Path(f"/proc/{node.pid}/root{folder}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a node and everything it started, as a machine that is gone."""
    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(process.pid)
        for one in [*found.children(recursive=True), found]:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
    process.wait()


def wait(
    condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float, what: str
) -> None:
    """Wait for a condition, while the process lives."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(ValueError, OSError):  # a line half written; not there yet
            if condition():
                return
        assert process.poll() is None, what
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds} s")


def started(log: Path) -> bool:
    """Whether `ray start` says so in its log."""
    return "Ray runtime started" in log.read_text()


@contextmanager
def short_folder() -> Iterator[Path]:
    """A temporary folder with a short path, as sockets need."""
    folder = Path(f"/tmp/kr-{os.getpid()}-{time.monotonic_ns() % 10_000}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)

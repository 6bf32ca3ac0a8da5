"""One endpoint per port, and a signal that ends it: with real sockets and real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from karma_ray.errors import InputError
from karma_ray.serving.process import held_port
from tests import tiny_run
from tests.serving.test_slow_clients import said_to_half_a_head

ROOT = Path(__file__).resolve().parents[2]


def _listener(port: int = 0, *, shared: bool = False) -> socket.socket:
    listener = socket.socket()
    if shared:  # as Serve opens its port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    return listener


@pytest.mark.parametrize("shared", [False, True], ids=["another program", "another endpoint"])
def test_a_port_on_which_somebody_listens_is_refused_by_name(shared: bool) -> None:
    with _listener(shared=shared) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"--port: {port} is used"), held_port("0.0.0.0", port):
            pass


def test_a_held_port_is_refused_to_a_second_endpoint_that_starts_beside_the_first() -> None:
    with _listener() as other:
        port = other.getsockname()[1]
    with held_port("127.0.0.1", port):
        with pytest.raises(InputError, match="--port"), held_port("127.0.0.1", port):
            pass
        with _listener(port, shared=True) as ours, socket.create_connection(("127.0.0.1", port)):
            ours.accept()[0].close()
    # connections that have just ended linger, and are no reason to refuse
    with held_port("127.0.0.1", port):
        pass


def test_a_host_that_is_not_this_machine_is_refused_by_name() -> None:
    for host in ("192.0.2.1", "no such host"):
        with pytest.raises(InputError, match="--host"), held_port(host, 8000):
            pass


def _endpoint(run: str, port: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "serve.py"), run, "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture
def endpoints() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_ends_an_endpoint_and_a_second_one_never_starts(
    tmp_path: Path, endpoints: list[subprocess.Popen[str]], number: signal.Signals
) -> None:
    run = tiny_run.write_run(tmp_path)
    with _listener() as other:
        port = other.getsockname()[1]
    endpoints.append(_endpoint(run, port))
    assert "ready" in endpoints[0].stdout.readline()
    endpoints.append(_endpoint(run, port))
    _, said = endpoints[1].communicate(timeout=120)
    assert endpoints[1].returncode == 2
    assert f"--port: {port} is used by another program" in said and "local Ray" not in said
    assert httpx.get(f"http://127.0.0.1:{port}/v1/healthz", timeout=30).status_code == 200
    assert said_to_half_a_head(f"http://127.0.0.1:{port}").startswith(b"HTTP/1.1 408")
    os.killpg(endpoints[0].pid, number)
    # Ray alone would take a minute, and abort
    _, said = endpoints[0].communicate(timeout=30)
    assert endpoints[0].returncode == 0
    assert "stopping" in said and "Failed to connect" not in said and "***" not in said

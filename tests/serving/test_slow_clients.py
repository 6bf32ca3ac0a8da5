"""Clients that send a request's head too slowly are closed, and others are not."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from karma_ray.serving import slow_clients
from karma_ray.serving.slow_clients import MAX_HEAD_BYTES, TimedProtocol, limit_servers

HEAD = b"GET /quick HTTP/1.1\r\nhost: here\r\n"


def application() -> FastAPI:
    app = FastAPI()

    @app.get("/quick")
    async def quick() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/slow")
    def slow() -> dict[str, str]:
        time.sleep(1.0)
        return {"status": "late"}

    @app.post("/unread")
    async def unread() -> dict[str, str]:
        return {"status": "not read"}

    return app


@pytest.fixture(scope="module", params=["given", "auto"])
def address(request) -> Iterator[tuple[str, int]]:
    before = dict(uvicorn.config.HTTP_PROTOCOLS)
    limits = slow_clients.MAX_HEAD_SECONDS, slow_clients.MAX_SILENT_SECONDS
    slow_clients.MAX_HEAD_SECONDS = slow_clients.MAX_SILENT_SECONDS = 0.5
    protocol = TimedProtocol if request.param == "given" else "auto"
    if protocol == "auto":  # as in a process of Ray Serve
        assert limit_servers() == []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        settings = uvicorn.Config(application(), http=protocol, log_level="warning")
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield listener.getsockname()
        server.should_exit = True
        thread.join()
    uvicorn.config.HTTP_PROTOCOLS.update(before)
    slow_clients.MAX_HEAD_SECONDS, slow_clients.MAX_SILENT_SECONDS = limits


def connected(address: tuple[str, int]) -> socket.socket:
    found = socket.create_connection(address)
    found.settimeout(60)
    return found


def said_to_half_a_head(url: str) -> bytes:
    """What an endpoint says to a client that sends half a head and waits."""
    host, port = url.removeprefix("http://").split(":")
    with connected((host, int(port))) as connection:
        connection.sendall(HEAD)
        return rest(connection)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionError:
        pass
    return found


def trickle(connection: socket.socket, stop: threading.Event, byte: bytes) -> None:
    try:
        while not stop.wait(0.05):
            connection.sendall(byte)
    except OSError:
        stop.set()


@pytest.mark.parametrize("begin", [b"", HEAD[:7], HEAD], ids=["nothing", "a line", "a header"])
def test_a_head_that_does_not_end_is_given_up(address, begin: bytes) -> None:
    with connected(address) as connection:
        connection.sendall(begin)
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 408" if begin else b"") and (begin or not answer)


def test_a_byte_now_and_then_does_not_lengthen_the_wait(address) -> None:
    stop = threading.Event()
    with connected(address) as connection:
        connection.sendall(HEAD + b"x: ")
        thread = threading.Thread(target=trickle, args=(connection, stop, b"x"))
        thread.start()
        answer = rest(connection)
        stop.set()
        thread.join()
    assert answer.startswith(b"HTTP/1.1 408") or not answer  # or a reset, as bytes were unread


def test_a_body_that_nobody_reads_does_not_keep_the_connection(address) -> None:
    stop = threading.Event()
    with connected(address) as connection:
        connection.sendall(b"POST /unread HTTP/1.1\r\nhost: h\r\ncontent-length: 100000\r\n\r\nx")
        thread = threading.Thread(target=trickle, args=(connection, stop, b"x"))
        thread.start()
        answer = rest(connection)
        stop.set()
        thread.join()
    assert answer.startswith(b"HTTP/1.1 200") and b"408" not in answer


def test_a_head_beyond_its_limit_is_refused(address) -> None:
    with connected(address) as connection:
        try:
            connection.sendall(HEAD)
            for _ in range(2 * MAX_HEAD_BYTES // 1000):
                connection.sendall(b"a: " + b"x" * 995 + b"\r\n")
        except ConnectionError:
            pass
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 431") or not answer


def test_slow_answers_later_requests_and_bodies_are_let_be(
    address, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://{address[0]}:{address[1]}"
    with httpx.Client(base_url=url, timeout=60) as client:
        for path in ("/quick", "/slow", "/quick"):
            assert client.get(path).status_code == 200
        assert client.post("/unread", content=b"x" * 300_000).status_code == 200
        assert client.get("/quick").status_code == 200
    # Between its two pieces this process may have to wait for a core.
    monkeypatch.setattr(slow_clients, "MAX_HEAD_SECONDS", 60.0)
    with connected(address) as connection:  # two requests in one piece, and one in two
        connection.sendall(2 * (HEAD + b"\r\n") + HEAD)
        connection.sendall(b"connection: close\r\n\r\n")
        assert rest(connection).count(b"HTTP/1.1 200") == 3

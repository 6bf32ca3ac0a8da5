"""Connections of clients that send too slowly, or nothing, are closed.

Uvicorn waits for the end of a request's head for ever: a few hundred connections that send a byte
now and then would hold all file descriptors. A body is limited in `guards.py`, an idle connection
after an answer by uvicorn.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn import config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_SECONDS = 10.0
"""Time in which a client must have sent the head of a request, from its first byte."""
MAX_SILENT_SECONDS = 30.0
"""Time after which a connection is closed on which nothing was ever sent."""
MAX_HEAD_BYTES = 65_536
"""Largest head of a request, which is the least that is accepted in one piece."""
_END = b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_TOO_SLOW = b"HTTP/1.1 408 Request Timeout" + _END
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large" + _END


class TimedProtocol(HttpToolsProtocol):
    """Uvicorn's protocol with a limit on the time and size of a request's head."""

    _timer: asyncio.TimerHandle | None = None
    _begun = _head = False  # whether a request has begun and not ended, and is in its head
    _head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Wait for the first byte."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(MAX_SILENT_SECONDS, self._end, b"")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the limit."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass data on, and limit the head that they belong to."""
        super().data_received(data)
        # A body is limited by the application that reads it, but after its answer nobody does.
        ignored = self._begun and self.cycle is not None and self.cycle.response_complete
        if not (self._head or ignored):
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(MAX_HEAD_SECONDS, self._end, _TOO_SLOW)
        if self._head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._end(_TOO_LARGE)

    def on_message_begin(self) -> None:
        """Note that a head begins."""
        self._stop()  # from here the limit is that of the head, however many bytes it comes in
        self._begun = self._head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Note that the head has ended."""
        self._head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note that the request has ended."""
        self._begun = False
        super().on_message_complete()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, answer: bytes) -> None:
        self._stop()
        if not self.transport.is_closing():
            if self._head:
                self.transport.write(answer)
            self.transport.close()


def limit_servers() -> list[Any]:
    """Let every server that uvicorn starts in this process from now on limit its clients.

    Ray Serve starts uvicorn itself, with its `auto` protocol, and lets a function that the setting
    `CALLBACK` names be called before. Returns no middlewares, as Serve asks for.
    """
    config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{TimedProtocol.__name__}"
    return []


CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:{limit_servers.__name__}"}
"""What must be set where Serve's proxies and replicas run."""

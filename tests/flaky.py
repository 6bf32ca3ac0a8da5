"""A proxy before an HTTP server that answers some requests with errors, or not at all."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TIMEOUT = 0
"""A fault that is no answer."""


class FlakyProxy(ThreadingHTTPServer):
    """Passes requests on to `port`, except every `every`-th, which meets the next of `faults`."""

    daemon_threads = True

    def __init__(self, port: int, faults: Sequence[int], every: int, hang_s: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.faults, self.every, self.hang_s = port, list(faults), every, hang_s
        self.injected: Counter[int] = Counter()
        self.num_requests = 0
        self._counting = threading.Lock()

    def fault(self) -> int | None:
        """Return the fault that the next request meets."""
        with self._counting:
            self.num_requests += 1
            if self.num_requests % self.every:
                return None
            fault = self.faults[(self.num_requests // self.every - 1) % len(self.faults)]
            self.injected[fault] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FlakyProxy

    def _answer(self) -> None:
        body = self._body()
        fault = self.server.fault()
        if fault == TIMEOUT:
            time.sleep(self.server.hang_s)
            self.close_connection = True
            return
        if fault is not None:
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.target)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        headers["Content-Length"] = str(len(body))
        upstream.request(self.command, self.path, body, headers)
        response = upstream.getresponse()
        content = response.read()
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        if not response.getheader("Content-Length"):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        upstream.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def log_message(self, *message: object) -> None:
        pass


@contextmanager
def flaky_proxy(
    port: int, faults: Sequence[int], every: int = 3, hang_s: float = 2.0
) -> Iterator[FlakyProxy]:
    """A running proxy before 127.0.0.1:`port`."""
    proxy = FlakyProxy(port, faults, every, hang_s)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()

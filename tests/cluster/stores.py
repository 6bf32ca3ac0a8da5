"""A real S3 server on loopback, for tests that take it away; and a process that trains on files."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
import s3fs
from moto.server import ThreadedMotoServer

BUCKET = "runs"


class Store:
    """An S3 server that can go away and come back with what it held."""

    def __init__(self) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.outages = 0
        self._server: ThreadedMotoServer | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }

    def start(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        """From now on connections are refused."""
        assert self._server is not None and self._server._server is not None
        self._server.stop()
        self._server._server.server_close()

    def go_away(self, seconds: float) -> None:
        """Be out of reach for so long; returns at once."""
        self.stop()
        self.outages += 1
        threading.Timer(seconds, self.start).start()


@contextmanager
def running_store(patch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store with one bucket; this process talks to it."""
    store = Store()
    for name, value in store.environment.items():
        patch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # clients of another test's server
    store.start()
    # The server's buckets belong to this process, not to the server: an earlier test left its own.
    reset = urllib.request.Request(f"http://127.0.0.1:{store.port}/moto-api/reset", method="POST")
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(reset).close()
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    try:
        yield store
    finally:
        store.stop()
        s3fs.S3FileSystem.clear_instance_cache()

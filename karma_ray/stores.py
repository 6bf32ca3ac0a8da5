"""Object stores: how often a request is tried again, and what is said when all tries have failed.

A store that answers 500, 502, 503 or 504, asks to slow down, drops the connection or does not
answer in time is asked again after a pause that doubles and has a random part (botocore's mode
`standard`). The usual variables AWS_MAX_ATTEMPTS and AWS_RETRY_MODE say otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fsspec.spec import AbstractBufferedFile

MAX_ATTEMPTS = 6
"""Tries of one request; the pauses between them add up to a quarter of a minute on average."""
_S3 = ("s3://", "s3a://")
_BUSY = 429


def store_options(uri: str) -> dict[str, Any]:
    """Return what the file system of `uri` is told beyond the usual variables."""
    if not uri.startswith(_S3):
        return {}
    retries: dict[str, Any] = {}
    if "AWS_RETRY_MODE" not in os.environ:
        retries["mode"] = "standard"
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = MAX_ATTEMPTS
    return {"config_kwargs": {"retries": retries}} if retries else {}


@contextmanager
def dropped_on_failure(sink: Any) -> Iterator[None]:
    """Keep a file that a store is sent from appearing by halves when an error closes it."""
    try:
        yield
    except BaseException:
        if isinstance(sink, AbstractBufferedFile):
            sink.discard()
            sink.closed = True
        raise


def failure(error: BaseException) -> str | None:
    """Return a sentence on a store that did not answer, or None if `error` is another one.

    Clients raise errors of their own, or OSErrors that are caused by them.
    """
    causes: list[BaseException] = []
    place: BaseException | None = error
    while place is not None and place not in causes:
        causes.append(place)
        place = place.__cause__
    for cause in causes:
        names = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(cause).__mro__}
        lost = names & {"botocore.ConnectionError", "botocore.HTTPClientError",
                        "botocore.IncompleteReadError", "fsspec.FSTimeoutError"}  # fmt: skip
        if lost or _status(cause) >= 500 or _status(cause) == _BUSY:
            said = " ".join(str(cause).split()) or type(cause).__name__
            return f"the object store did not answer, even after repeated tries ({said})"
    return None


def _status(error: BaseException) -> int:
    response = getattr(error, "response", None)
    found = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    status = found.get("HTTPStatusCode", 0)
    return status if isinstance(status, int) else 0

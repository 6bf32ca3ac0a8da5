"""Every request has an id and an arm in its headers, and a line in the log if one is asked for.

A line never holds a user id or a query unless asked: a user is told by a salted hash, which is the
same for all requests of the user to endpoints that follow the same live folder.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import sys
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from karma_ray.errors import InputError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from karma_ray.serving.measures import Measures

CALLS = frozenset({"/v1/recall", "/v1/score", "/v1/rank", "/v1/features", "/v1/events"})
"""Paths that are logged; probes are not."""
REQUEST_ID, ARM = b"x-request-id", b"x-karma-arm"
_ID = re.compile(rb"[\w.:-]{1,128}")
_FACTS = "karma_ray"
_LOGGED = ("arm", "model_version", "index_version", "batch_size")


@dataclass(frozen=True)
class LogSettings:
    """Where requests are logged, and whether with what users sent."""

    path: str
    """A file, appended to, or `-` for the standard output."""
    raw: bool = False
    """Write user ids and queries as they are."""


class RequestLog:
    """JSON lines, one per request."""

    def __init__(self, settings: LogSettings, salt: str) -> None:
        """Raises InputError when the file cannot be written."""
        self._settings, self._salt = settings, salt.encode()
        try:
            self._file = (
                # Serve sends sys.stdout of a replica to a log that drops what is no warning.
                sys.__stdout__ or sys.stdout
                if settings.path == "-"
                else open(settings.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            )
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
            raise InputError("--log-requests", settings.path, problem) from None

    def write(self, facts: dict[str, Any], path: str, status: int, seconds: float) -> None:
        """Write the line of an answered request."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": facts["request_id"], "path": path, "status": status,
            "latency_ms": round(1000 * seconds, 3), **{k: facts.get(k) for k in _LOGGED},
        }  # fmt: skip
        if facts.get("user_id") is not None:
            line["user"] = self.hidden(facts["user_id"])
        if self._settings.raw:
            line.update(user_id=facts.get("user_id"), query=facts.get("query"))
        # One write per line, so that processes that share the file do not mix their lines.
        self._file.write(json.dumps(line, ensure_ascii=True) + "\n")
        self._file.flush()

    def hidden(self, user_id: str) -> str:
        """Return the hash of a user id."""
        found = hmac.new(self._salt, user_id.encode("utf-8", "surrogatepass"), hashlib.sha256)
        return found.hexdigest()[:16]


class NamedRequests:
    """Stands before everything else: refused requests have an id and a line too."""

    def __init__(self, app: ASGIApp, measures: Measures, log: RequestLog | None) -> None:
        self.app, self._measures, self._log = app, measures, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and name it in the answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 500
        name = _given_id(scope) or uuid.uuid4().hex.encode()
        facts: dict[str, Any] = {"request_id": name.decode()}
        scope[_FACTS] = facts

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (REQUEST_ID, name)]
                if "arm" in facts:
                    headers.append((ARM, facts["arm"].encode()))
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, answer)
        finally:
            if (path := scope["path"]) in CALLS:
                if not facts.get("parsed"):  # refused before any handler could count it
                    self._measures.refused(path, status)
                if self._log is not None:
                    self._log.write(facts, path, status, time.perf_counter() - begin)


def facts_of(scope: Scope) -> dict[str, Any]:
    """Return what is noted of a request, for its handler to add to."""
    facts: dict[str, Any] = scope.setdefault(_FACTS, {})
    facts["parsed"] = True
    return facts


def _given_id(scope: Scope) -> bytes | None:
    for name, value in scope["headers"]:
        if name == REQUEST_ID and _ID.fullmatch(value):
            return bytes(value)
    return None

"""What stands before the application: who may ask, how large a body may be, how slow a client.

Plain ASGI, because each request passes it: a refusal costs neither parsing nor a handler.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 1_000_000
"""Largest body of a request."""
MAX_BODY_SECONDS = 10.0
"""Time in which a client must have sent its body."""
RETRY_AFTER_S = 1
"""Value of `Retry-After` on a 503."""
OPEN_PATHS = frozenset({"/", "/v1/healthz"})
"""Paths that need no token: the search page, which asks for it, and what probes ask."""
ALWAYS_ANSWERED = frozenset({"/", "/v1/healthz", "/v1/version", "/metrics"})
"""Paths that are answered under any load."""


class _Refused(Exception):
    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}


class Guards:
    """Refuses with 401, 408, 413 or 503 before anything is parsed."""

    def __init__(self, app: ASGIApp, token: str | None, is_full: Callable[[], bool]) -> None:
        """Without a `token` everyone may ask; `is_full` says that no further request fits."""
        self.app, self._token, self._is_full = app, token, is_full

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            self._check(scope["path"], headers)
            if scope["method"] == "POST":
                body = await _body(receive, headers)
                # `curl -d` without a header claims to send a form; every body here is JSON.
                rest = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
                scope = {**scope, "headers": [*rest, (b"content-type", b"application/json")]}
                receive = _given(body, receive)
        except _Refused as refusal:
            await _refuse(send, refusal)
            return
        await self.app(scope, receive, send)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._token is not None and path not in OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._token.encode()):
                raise _Refused(401, "a bearer token is needed", {"www-authenticate": "Bearer"})
        if path not in ALWAYS_ANSWERED and self._is_full():
            raise _Refused(503, "too many requests wait", {"retry-after": str(RETRY_AFTER_S)})
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            raise _Refused(400, "content-length is not a number")
        if int(length) > MAX_BODY_BYTES:
            raise _too_large()


async def _body(receive: Receive, headers: dict[bytes, bytes]) -> bytes:
    message = await receive()
    if not message.get("more_body"):
        return _checked(bytes(message.get("body", b"")))
    parts = [message["body"]]
    try:
        async with asyncio.timeout(MAX_BODY_SECONDS):
            while message.get("more_body"):
                message = await receive()
                parts.append(message.get("body", b""))
                if sum(map(len, parts)) > MAX_BODY_BYTES:
                    raise _too_large()
    except TimeoutError:
        raise _Refused(408, f"the body did not come within {MAX_BODY_SECONDS:.0f} s") from None
    return b"".join(parts)


def _checked(body: bytes) -> bytes:
    if len(body) > MAX_BODY_BYTES:
        raise _too_large()
    return body


def _too_large() -> _Refused:
    return _Refused(413, f"the body is larger than {MAX_BODY_BYTES} bytes")


def _given(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that first gives a body that has been read."""
    waiting = [body]

    async def given() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return given


async def _refuse(send: Send, refusal: _Refused) -> None:
    content = json.dumps({"detail": refusal.detail}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content))}
    pairs = [(n.encode(), v.encode()) for n, v in {**headers, **refusal.headers}.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})

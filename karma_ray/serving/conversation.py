"""What a client says to the endpoint, and what it does with the answer; it sends nothing itself.

- A conversation is a generator that says what to send and how long to wait, so that retries and
  errors cannot differ between the client that waits and the one that does not.
- A 503 is asked again after its `Retry-After`, lengthened by a random part, so that refused clients
  do not come back together.
- A lost connection is asked again once, unless the call may have been carried out and would count
  twice: clicks are repeated only if no connection was made. So is an error of the host, which is
  what Ray Serve answers for a replica that was lost while it computed.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx

from karma_ray.errors import InputError, KarmaRayError

MAX_WAIT_S = 10.0
"""Longest wait between two attempts, whatever `Retry-After` says."""
JITTER = 0.5
"""Largest random part of a wait, as a share of it."""


class EndpointError(KarmaRayError):
    """The endpoint refused or failed; `status` is None if it was not reached."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Click:
    """One past click of a user."""

    item_id: str
    query: str | None = None
    timestamp: datetime | None = None

    def body(self) -> dict[str, Any]:
        """Return it as the endpoint reads it."""
        at = None if self.timestamp is None else self.timestamp.isoformat()
        fields = {"item_id": self.item_id, "query": self.query, "timestamp": at}
        return {name: value for name, value in fields.items() if value is not None}


History = Sequence[Click | str]
"""Past clicks, oldest first; an item id alone is a click without query and time."""


@dataclass(frozen=True)
class Call:
    """A request that was not sent yet."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    repeatable: bool = True
    """Whether it may be carried out twice."""


Reply = httpx.Response | httpx.TransportError
Steps = Generator[Call | float, Reply | None, Any]
"""A call is sent, a number is waited for in seconds; the answer comes at the end."""


def conversation(call: Call, num_retries: int, draws: random.Random) -> Steps:
    """Ask until there is an answer; raises InputError for a 422 and EndpointError otherwise."""
    lost = False
    for left in range(num_retries, -1, -1):
        reply = yield call
        if isinstance(reply, httpx.TransportError):
            if lost or left == 0 or not _may_repeat(call, reply):
                raise EndpointError(f"{call.path} was not answered: {_said(reply)}") from reply
            lost = True
        else:
            assert reply is not None
            if left and call.repeatable and not lost and _is_of_the_host(reply):
                lost = True
                continue
            if reply.status_code != 503 or left == 0:
                return _answer_of(call, reply)
            yield _wait_of(reply) * (1.0 + JITTER * draws.random())
    raise AssertionError("the last attempt answers or raises")


def _may_repeat(call: Call, error: httpx.TransportError) -> bool:
    if isinstance(error, httpx.ConnectError):
        return True
    return call.repeatable and isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)


def _is_of_the_host(reply: httpx.Response) -> bool:
    """Whether a host or a proxy failed, not the endpoint, whose own errors are JSON."""
    kind = reply.headers.get("content-type", "")
    return reply.status_code in (500, 502, 504) and not kind.startswith("application/json")


def _said(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__


def _wait_of(reply: httpx.Response) -> float:
    """Return the seconds of `Retry-After`, which may also be a date; then it is one second."""
    try:
        seconds = float(reply.headers.get("retry-after", "1"))
    except ValueError:
        seconds = 1.0
    return min(max(seconds, 0.0), MAX_WAIT_S)


def _answer_of(call: Call, reply: httpx.Response) -> Any:
    try:
        content = reply.json()
    except ValueError:
        content = {"detail": reply.text[:200]}
    if reply.status_code == 200:
        return content
    detail = content.get("detail", "") if isinstance(content, dict) else content
    if reply.status_code == 422 and isinstance(detail, list) and detail:
        raise _wrong_input(call, detail[0])
    message = f"{call.path} was answered with {reply.status_code}: {detail}"
    raise EndpointError(message, reply.status_code)


def _wrong_input(call: Call, error: Mapping[str, Any]) -> InputError:
    """Name the field; the endpoint does not repeat its value, so it is read from what was sent."""
    places = [place for place in error["loc"] if place != "body"]
    field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in places).lstrip(".")
    value: Any = call.body
    for place in places:
        try:
            value = value[place]
        except (KeyError, IndexError, TypeError):
            value = None
    return InputError(field or "body", value, f"was refused: {error['msg']}")


def _request(
    query: str | None, history: History | None, user_id: str | None, **others: Any
) -> dict[str, Any]:
    clicks = None
    if history is not None:
        clicks = [Click(entry) if isinstance(entry, str) else entry for entry in history]
    fields = {
        "query": query, "user_id": user_id,
        "history": None if clicks is None else [click.body() for click in clicks], **others,
    }  # fmt: skip
    return {name: value for name, value in fields.items() if value is not None}


def recall_call(
    path: str, query: str | None, history: History | None, user_id: str | None, *,
    item_ids: Sequence[str] | None = None, k: int | None = None, exclude_history: bool = False,
    exclude: Sequence[str] = (), category: str | None = None,
) -> Call:  # fmt: skip
    """Ask `/v1/recall` or `/v1/rank`; what is not given is left to the endpoint."""
    body = _request(
        query, history, user_id, item_ids=None if item_ids is None else list(item_ids), k=k,
        exclude_history=exclude_history or None, exclude=list(exclude) or None, category=category,
    )  # fmt: skip
    return Call("POST", path, body)


def score_call(
    path: str, query: str | None, history: History | None, user_id: str | None, ids: Sequence[str]
) -> Call:
    """Ask for scores, or for features, of items."""
    return Call("POST", path, _request(query, history, user_id, item_ids=list(ids)))


def event_call(user_id: str, click: Click | str) -> Call:
    """Store a click."""
    click = Click(click) if isinstance(click, str) else click
    return Call("POST", "/v1/events", {"user_id": user_id, **click.body()}, repeatable=False)

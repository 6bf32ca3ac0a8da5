"""A typed client of the endpoint, for callers that wait (`Client`) and that do not (`AsyncClient`).

    with Client("http://127.0.0.1:8000") as client:
        for item in client.recall("red mug", history=["i3", "i7"], k=5)["items"]:
            print(item["score"], item["title"])

Importing it loads neither torch nor the model.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import httpx

from karma_ray.serving.conversation import (
    Call,
    Click,
    EndpointError,
    History,
    Reply,
    conversation,
    event_call,
    recall_call,
    score_call,
)

if TYPE_CHECKING:
    from karma_ray.serving import schemas

__all__ = ["AsyncClient", "Click", "Client", "EndpointError", "History"]

TOKEN = "KARMA_RAY_TOKEN"
"""Environment variable with the bearer token: the endpoint asks for it, clients send it."""
TIMEOUT_S = 10.0
"""Seconds within which a connection, and then an answer, must come."""
NUM_RETRIES = 3
"""How often a refused request is asked again."""


def _settings(url: str, token: str | None, timeout_s: float) -> dict[str, Any]:
    token = token if token is not None else os.environ.get(TOKEN)
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return {"base_url": url, "headers": headers, "timeout": timeout_s}


class Client:
    """Asks the endpoint and waits for its answer. For several threads.

    Every call raises InputError with the name of the field that was refused, and EndpointError
    when there is no answer.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        num_retries: int = NUM_RETRIES,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        draws: random.Random | None = None,
    ) -> None:
        """Without `token`, that of the environment variable KARMA_RAY_TOKEN is sent, if set."""
        self._http = httpx.Client(**_settings(url, token, timeout_s), transport=transport)
        self._num_retries, self._sleep = num_retries, sleep
        self._draws = draws or random.Random()

    def recall(
        self, query: str | None = None, history: History | None = None, *,
        user_id: str | None = None, k: int = 10, exclude_history: bool = False,
        exclude: Sequence[str] = (), category: str | None = None,
    ) -> schemas.RecallResponse:  # fmt: skip
        """Return the k best items; without `history`, the stored clicks of `user_id` are used.

        Items of `exclude` are left out; with `category` all are of that one.
        """
        call = recall_call(
            "/v1/recall", query, history, user_id, k=k, exclude_history=exclude_history,
            exclude=exclude, category=category,
        )  # fmt: skip
        return cast("schemas.RecallResponse", self._ask(call))

    def score(
        self, item_ids: Sequence[str], query: str | None = None, history: History | None = None,
        *, user_id: str | None = None,
    ) -> schemas.ScoreResponse:  # fmt: skip
        """Return the score of each item, in order; None for an unknown one."""
        call = score_call("/v1/score", query, history, user_id, item_ids)
        return cast("schemas.ScoreResponse", self._ask(call))

    def rank(
        self, query: str | None = None, history: History | None = None, *,
        item_ids: Sequence[str] | None = None, k: int | None = None, user_id: str | None = None,
        exclude_history: bool = False, exclude: Sequence[str] = (), category: str | None = None,
    ) -> schemas.RankResponse:  # fmt: skip
        """Order `item_ids`, or the k items that recall finds, by their chance of a click."""
        call = recall_call(
            "/v1/rank", query, history, user_id, item_ids=item_ids, k=k,
            exclude_history=exclude_history, exclude=exclude, category=category,
        )  # fmt: skip
        return cast("schemas.RankResponse", self._ask(call))

    def features(
        self, item_ids: Sequence[str], query: str | None = None, history: History | None = None,
        *, user_id: str | None = None,
    ) -> schemas.FeaturesResponse:  # fmt: skip
        """Return similarities of each item to the history, for a ranking model."""
        call = score_call("/v1/features", query, history, user_id, item_ids)
        return cast("schemas.FeaturesResponse", self._ask(call))

    def event(self, user_id: str, click: Click | str) -> schemas.EventResponse:
        """Store a click of a user."""
        return cast("schemas.EventResponse", self._ask(event_call(user_id, click)))

    def healthz(self) -> schemas.Health:
        """Return whether the endpoint answers, and the number of items."""
        return cast("schemas.Health", self._ask(Call("GET", "/v1/healthz")))

    def version(self) -> schemas.Versions:
        """Return the content hashes of model and index."""
        return cast("schemas.Versions", self._ask(Call("GET", "/v1/version")))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        """Return itself; the connections are closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        """Close the connections."""
        self.close()

    def _ask(self, call: Call) -> Any:
        steps = conversation(call, self._num_retries, self._draws)
        reply: Reply | None = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as end:
                return end.value
            reply = None
            if isinstance(step, Call):
                try:
                    reply = self._http.request(step.method, step.path, json=step.body)
                except httpx.TransportError as error:
                    reply = error
            else:
                self._sleep(step)


class AsyncClient:
    """As `Client`, for callers in an event loop."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        num_retries: int = NUM_RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        draws: random.Random | None = None,
    ) -> None:
        """Without `token`, that of the environment variable KARMA_RAY_TOKEN is sent, if set."""
        self._http = httpx.AsyncClient(**_settings(url, token, timeout_s), transport=transport)
        self._num_retries, self._sleep = num_retries, sleep
        self._draws = draws or random.Random()

    async def recall(
        self, query: str | None = None, history: History | None = None, *,
        user_id: str | None = None, k: int = 10, exclude_history: bool = False,
        exclude: Sequence[str] = (), category: str | None = None,
    ) -> schemas.RecallResponse:  # fmt: skip
        """Return the k best items; without `history`, the stored clicks of `user_id` are used.

        Items of `exclude` are left out; with `category` all are of that one.
        """
        call = recall_call(
            "/v1/recall", query, history, user_id, k=k, exclude_history=exclude_history,
            exclude=exclude, category=category,
        )  # fmt: skip
        return cast("schemas.RecallResponse", await self._ask(call))

    async def score(
        self, item_ids: Sequence[str], query: str | None = None, history: History | None = None,
        *, user_id: str | None = None,
    ) -> schemas.ScoreResponse:  # fmt: skip
        """Return the score of each item, in order; None for an unknown one."""
        call = score_call("/v1/score", query, history, user_id, item_ids)
        return cast("schemas.ScoreResponse", await self._ask(call))

    async def rank(
        self, query: str | None = None, history: History | None = None, *,
        item_ids: Sequence[str] | None = None, k: int | None = None, user_id: str | None = None,
        exclude_history: bool = False, exclude: Sequence[str] = (), category: str | None = None,
    ) -> schemas.RankResponse:  # fmt: skip
        """Order `item_ids`, or the k items that recall finds, by their chance of a click."""
        call = recall_call(
            "/v1/rank", query, history, user_id, item_ids=item_ids, k=k,
            exclude_history=exclude_history, exclude=exclude, category=category,
        )  # fmt: skip
        return cast("schemas.RankResponse", await self._ask(call))

    async def features(
        self, item_ids: Sequence[str], query: str | None = None, history: History | None = None,
        *, user_id: str | None = None,
    ) -> schemas.FeaturesResponse:  # fmt: skip
        """Return similarities of each item to the history, for a ranking model."""
        call = score_call("/v1/features", query, history, user_id, item_ids)
        return cast("schemas.FeaturesResponse", await self._ask(call))

    async def event(self, user_id: str, click: Click | str) -> schemas.EventResponse:
        """Store a click of a user."""
        return cast("schemas.EventResponse", await self._ask(event_call(user_id, click)))

    async def healthz(self) -> schemas.Health:
        """Return whether the endpoint answers, and the number of items."""
        return cast("schemas.Health", await self._ask(Call("GET", "/v1/healthz")))

    async def version(self) -> schemas.Versions:
        """Return the content hashes of model and index."""
        return cast("schemas.Versions", await self._ask(Call("GET", "/v1/version")))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        """Return itself; the connections are closed at the end of the block."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        """Close the connections."""
        await self.close()

    async def _ask(self, call: Call) -> Any:
        steps = conversation(call, self._num_retries, self._draws)
        reply: Reply | None = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as end:
                return end.value
            reply = None
            if isinstance(step, Call):
                try:
                    reply = await self._http.request(step.method, step.path, json=step.body)
                except httpx.TransportError as error:
                    reply = error
            else:
                await self._sleep(step)

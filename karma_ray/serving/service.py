"""A loaded run that answers: the engine, its compute thread, stored users and counters."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from karma_ray.retrieval.filters import Filter
from karma_ray.retrieval.requests import HistoryItem, Request
from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving import engine as calls
from karma_ray.serving import schemas
from karma_ray.serving.batching import Batcher, Overloaded
from karma_ray.serving.engine import Engine
from karma_ray.serving.measures import Measures
from karma_ray.serving.users import LocalUsers, UserStore

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_WAITING = 64
"""Requests that may wait for the compute thread; further ones get the status 503."""
MAX_SLOTS = 2048
"""Slots of the user decoder, at most, that the requests of one batch run together."""
CACHE_BYTES = 2**29
"""Bound of the stored keys and values of histories: half a gigabyte."""
DEADLINE_S = 5.0
"""A request that no batch has taken after this time is given up with the status 503."""


class Service:
    """Answers parsed requests; its methods belong to the event loop."""

    def __init__(
        self,
        retriever: Retriever,
        users: UserStore | None = None,
        *,
        cache_bytes: int = CACHE_BYTES,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """`users` are stored in this process unless told otherwise."""
        self.engine = Engine(retriever, cache_bytes)
        self.users = users or LocalUsers(max(1, self.engine.limit))
        self.measures = Measures(lambda: self._batcher.num_waiting, lambda: self.engine.cache)
        self._batcher: Batcher[calls.Call, Any] = Batcher(
            self._work, MAX_SLOTS, max_waiting, self.measures.batch
        )

    @classmethod
    def load(cls, run: str, num_threads: int = 1, **options: Any) -> Service:
        """Load a finished run; computes with `num_threads`. Raises as `Retriever.load` does."""
        torch.set_num_threads(num_threads)
        return cls(Retriever.load(run), **options)

    @property
    def num_items(self) -> int:
        """Number of items of the live index."""
        return self.engine.retriever.index.num_items

    @property
    def is_full(self) -> bool:
        """Whether a further request would be refused."""
        return self._batcher.is_full

    async def recall(self, body: schemas.RecallRequest) -> dict[str, Any]:
        """Return the k best items of the whole catalogue."""
        request = await self._request(body)
        wanted = Filter(frozenset(body.exclude), body.category)
        if body.exclude_history:
            wanted = wanted.without_history(request)
        call = calls.RecallCall(request, body.k, wanted)
        answer, version = await self._submit(call)
        items = [
            {"item_id": item.item_id, "score": item.score, "title": item.title}
            for item in answer.items
        ]
        return {"items": items, "ignored_item_ids": answer.ignored_item_ids, **version}

    async def score(self, body: schemas.ScoreRequest) -> dict[str, Any]:
        """Return the scores of given items."""
        request = await self._request(body)
        answer, version = await self._submit(calls.ScoreCall(request, body.item_ids))
        return {"scores": answer.scores, "ignored_item_ids": answer.ignored_item_ids, **version}

    async def features(self, body: schemas.FeaturesRequest) -> dict[str, Any]:
        """Return similarities of given items to the history."""
        request = await self._request(body)
        answer, version = await self._submit(calls.FeaturesCall(request, body.item_ids))
        ignored = answer.scores.ignored_item_ids
        return {"features": answer.features, "ignored_item_ids": ignored, **version}

    async def event(self, body: schemas.EventRequest) -> dict[str, Any]:
        """Store a click, and its keys and values, so that the next request runs its query only."""
        if self.engine.retriever.table.row(body.item_id) < 0:
            history = await self.users.history(body.user_id)
            return {"num_clicks": len(history), "known": False}
        count = await self.users.append(body.user_id, body.click())
        history = await self.users.history(body.user_id)
        with suppress(Overloaded):  # the click is stored; a 503 would have it sent twice
            await self._submit(calls.RememberCall(Request(None, history)))
        return {"num_clicks": count, "known": True}

    def close(self) -> None:
        """Answer what waits, then end the compute thread."""
        self._batcher.close()

    async def _request(self, body: Any) -> Request:
        history: list[HistoryItem] = []
        if body.history is not None:
            history = [entry.click() for entry in body.history]
        elif body.user_id is not None:
            history = await self.users.history(body.user_id)
        return Request(body.query, history)

    async def _submit(self, call: calls.Call) -> tuple[Any, dict[str, str]]:
        """Return the answer and the versions of what gave it."""
        answer: tuple[Any, dict[str, str]] = await self._batcher.submit(
            call, self.engine.weight(call), DEADLINE_S
        )
        return answer

    def _work(self, batch: Sequence[calls.Call]) -> list[Any]:
        engine = self.engine  # one for the whole batch, whatever is published meanwhile
        return [
            answer if isinstance(answer, Exception) else (answer, engine.version)
            for answer in engine.answer(batch)
        ]

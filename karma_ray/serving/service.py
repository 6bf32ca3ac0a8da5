"""Loaded runs that answer: their engines, the compute thread, stored users and counters.

A request keeps the engine that it met: model, table, index and stored histories belong together,
so that no answer mixes two publications.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from karma_ray.errors import InputError
from karma_ray.retrieval.delta import num_live
from karma_ray.retrieval.filters import Filter
from karma_ray.retrieval.parts import served
from karma_ray.retrieval.requests import HistoryItem, Request
from karma_ray.serving import engine as calls
from karma_ray.serving import schemas
from karma_ray.serving.arms import FIRST, Arm, Arms
from karma_ray.serving.batching import Batcher, Overloaded
from karma_ray.serving.engine import Engine
from karma_ray.serving.following import Follower, engine_of, load_engine
from karma_ray.serving.live import is_live_folder
from karma_ray.serving.measures import Measures
from karma_ray.serving.ranking import NotRanked, RankCall
from karma_ray.serving.users import LocalUsers, UserStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from karma_ray.retrieval.retriever import Retriever

MAX_SLOTS = 2048
"""Slots of the user decoder, at most, that the requests of one batch run together."""
CACHE_BYTES = 2**29
"""Bound of the stored keys and values of histories: half a gigabyte."""
DEADLINE_S = 5.0
"""A request that no batch has taken after this time is given up with the status 503."""


Facts = dict[str, Any]
"""What is said of a request in headers and logs; handlers add to it."""


@dataclass(frozen=True)
class _Asked:
    call: calls.Call
    engine: Engine


class Service:
    """Answers parsed requests; its methods belong to the event loop, but `swap` to any thread."""

    def __init__(
        self,
        live: Retriever | Arms,
        users: UserStore | None = None,
        *,
        cache_bytes: int = CACHE_BYTES,
        max_waiting: int | None = None,
    ) -> None:
        """`users` are stored in this process unless told otherwise.

        `max_waiting` requests may wait for the compute thread, and further ones get the status 503;
        by default as many as keep the time of each short (batching.py).
        """
        self.arms = live if isinstance(live, Arms) else _alone(Engine(live, cache_bytes))
        self.users = users or LocalUsers()
        self.measures = Measures(
            lambda: self._batcher.num_waiting, lambda: self.engine.cache, lambda: self.arms
        )
        self.salt = secrets.token_hex(16)
        self._follower: Follower | None = None
        self._batcher: Batcher[_Asked, Any] = Batcher(
            self._work, MAX_SLOTS, max_waiting, self.measures.batch
        )

    @classmethod
    def load(
        cls, source: str, num_threads: int = 1, *, cache_bytes: int = CACHE_BYTES,
        precision: str = "auto", ranker: str | None = None, channels: str = "auto",
        **options: Any,
    ) -> Service:  # fmt: skip
        """Load a finished run, or what a live folder names, which is followed from then on.

        Computes with `num_threads`, in `precision`. `ranker` is the run of a CTR model, for
        `/v1/rank`; `channels` says which lists answer recall (`with_channels`). Raises as
        `Retriever.load` and `with_channels` do, and InputError when run and ranker do not fit.
        """
        torch.set_num_threads(num_threads)
        chosen: dict[str, Any] = {"ranker": ranker, "channels": channels}
        if not is_live_folder(source):
            engine = engine_of(served(source), cache_bytes, precision, **chosen)
            return cls(_alone(engine), cache_bytes=cache_bytes, **options)
        follower = Follower(source, lambda arm: load_engine(arm, cache_bytes, precision, **chosen))
        service = cls(follower.arms, cache_bytes=cache_bytes, **options)
        service.salt, service._follower = follower.live.salt, follower
        follower.start(service.swap, service.measures)
        return service

    def swap(self, live: Arms | Engine) -> Arms:
        """Let other engines answer all requests from now on; returns those that did.

        Requests that wait or run keep the engine that they met. Stored clicks of users stay.
        """
        before, self.arms = self.arms, live if isinstance(live, Arms) else _alone(live)
        return before

    @property
    def engine(self) -> Engine:
        """The engine of the first arm."""
        return self.arms.first.engine

    @property
    def num_items(self) -> int:
        """Number of items that the first arm can find."""
        return num_live(self.engine.retriever.index)

    @property
    def is_full(self) -> bool:
        """Whether a further request would be refused."""
        return self._batcher.is_full

    async def recall(
        self, body: schemas.RecallRequest, facts: Facts | None = None
    ) -> dict[str, Any]:
        """Return the k best items of the whole catalogue."""
        request = await self._request(body)
        call = calls.RecallCall(request, body.k, _filter(body, request))
        answer, version = await self._submit(call, body, facts)
        items = [
            {"item_id": item.item_id, "score": item.score, "title": item.title}
            for item in answer.items
        ]
        return {"items": items, "ignored_item_ids": answer.ignored_item_ids, **version}

    async def score(self, body: schemas.ScoreRequest, facts: Facts | None = None) -> dict[str, Any]:
        """Return the scores of given items."""
        request = await self._request(body)
        answer, version = await self._submit(calls.ScoreCall(request, body.item_ids), body, facts)
        return {"scores": answer.scores, "ignored_item_ids": answer.ignored_item_ids, **version}

    async def rank(self, body: schemas.RankRequest, facts: Facts | None = None) -> dict[str, Any]:
        """Order given items, or the k best ones, by their chance of a click."""
        if body.item_ids is not None:
            for name in ("k", "exclude_history", "exclude", "category"):
                if name in body.model_fields_set:
                    raise InputError(name, getattr(body, name), "is of recall; item_ids are given")
        request = await self._request(body)
        ranker = self._arm_of(body, None).engine.ranker
        if ranker is None:
            raise NotRanked
        call = RankCall(request, body.item_ids, body.k, _filter(body, request))
        answer, version = await self._submit(call, body, facts)
        for stage, seconds in answer.seconds.items():
            self.measures.rank_seconds.labels(stage).observe(seconds)
        return {
            "items": answer.items,
            "ignored_item_ids": answer.ignored_item_ids,
            "stages_ms": {name: round(1000 * value, 3) for name, value in answer.seconds.items()},
            "ranker_version": ranker.version, **version,
        }  # fmt: skip

    async def features(
        self, body: schemas.FeaturesRequest, facts: Facts | None = None
    ) -> dict[str, Any]:
        """Return similarities of given items to the history."""
        request = await self._request(body)
        answer, version = await self._submit(
            calls.FeaturesCall(request, body.item_ids), body, facts
        )
        ignored = answer.scores.ignored_item_ids
        return {"features": answer.features, "ignored_item_ids": ignored, **version}

    async def event(self, body: schemas.EventRequest, facts: Facts | None = None) -> dict[str, Any]:
        """Store a click, and its keys and values, so that the next request runs its query only."""
        arm = self._arm_of(body, facts)
        if arm.engine.retriever.table.row(body.item_id) < 0:
            history = await self.users.history(body.user_id)
            return {"num_clicks": len(history), "known": False}
        keep = max(1, arm.engine.limit)
        history = await self.users.append(body.user_id, body.click(), keep)
        with suppress(Overloaded):  # the click is stored; a 503 would have it sent twice
            await self._submit(calls.RememberCall(Request(None, history)), body, facts)
        return {"num_clicks": len(history), "known": True}

    def close(self) -> None:
        """Answer what waits, then end the threads."""
        if self._follower is not None:
            self._follower.stop()
        self._batcher.close()

    async def _request(self, body: Any) -> Request:
        history: list[HistoryItem] = []
        if body.history is not None:
            history = [entry.click() for entry in body.history]
        elif body.user_id is not None:
            history = await self.users.history(body.user_id)
        return Request(body.query, history)

    def _arm_of(self, body: Any, facts: Facts | None) -> Arm:
        arm = self.arms.of(body.user_id)
        if facts is not None:
            facts.update(arm=arm.name, user_id=body.user_id, query=body.query)
        return arm

    async def _submit(
        self, call: calls.Call, body: Any, facts: Facts | None
    ) -> tuple[Any, dict[str, str]]:
        """Return the answer and the versions of what gave it."""
        engine = self._arm_of(body, facts).engine
        answer, size = await self._batcher.submit(
            _Asked(call, engine), engine.weight(call), DEADLINE_S
        )
        if facts is not None:
            facts.update(engine.version, batch_size=size)
        return answer, engine.version

    def _work(self, batch: Sequence[_Asked]) -> list[Any]:
        """Answer each call with the engine that it met."""
        answers: list[Any] = [None] * len(batch)
        engines = {id(asked.engine): asked.engine for asked in batch}
        for key, engine in engines.items():
            places = [place for place, asked in enumerate(batch) if id(asked.engine) == key]
            try:
                found: list[Any] = engine.answer([batch[place].call for place in places])
            except Exception as error:  # the calls of another arm still have their answers
                found = [error] * len(places)
            for place, answer in zip(places, found, strict=True):
                failed = isinstance(answer, Exception)
                answers[place] = answer if failed else (answer, len(places))
        return answers


def _filter(body: schemas.RecallRequest, request: Request) -> Filter:
    wanted = Filter(frozenset(body.exclude), body.category)
    return wanted.without_history(request) if body.exclude_history else wanted


def _alone(engine: Engine) -> Arms:
    return Arms([Arm(FIRST, engine)])

"""The clicks that the endpoint stores of its users, for callers that send no history."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from karma_ray.retrieval.requests import HistoryItem

MAX_USERS = 100_000
"""Users whose clicks are stored; who was not heard of for longest is forgotten."""


class UserStore(Protocol):
    """Where the clicks of users are stored: in this process, or where all replicas see them."""

    async def append(self, user_id: str, click: HistoryItem) -> int:
        """Store a click; returns how many are stored of this user."""
        ...

    async def history(self, user_id: str) -> list[HistoryItem]:
        """Return the stored clicks, oldest first."""
        ...


class LocalUsers:
    """In this process: gone when it ends, and not seen by other replicas."""

    def __init__(self, max_clicks: int, max_users: int = MAX_USERS) -> None:
        """Of a user `max_clicks` are kept, and up to twice as many until the older half is dropped
        at once: a window that slid with every click would not find its stored states."""
        self._max_clicks, self._max_users = max_clicks, max_users
        self._clicks: OrderedDict[str, list[HistoryItem]] = OrderedDict()

    async def append(self, user_id: str, click: HistoryItem) -> int:
        """Store a click; returns how many are stored of this user."""
        clicks = self._clicks.setdefault(user_id, [])
        clicks.append(click)
        if len(clicks) >= 2 * self._max_clicks:
            del clicks[: len(clicks) - self._max_clicks]
        self._clicks.move_to_end(user_id)
        while len(self._clicks) > self._max_users:
            self._clicks.popitem(last=False)
        return len(clicks)

    async def history(self, user_id: str) -> list[HistoryItem]:
        """Return the stored clicks, oldest first."""
        return list(self._clicks.get(user_id, ()))

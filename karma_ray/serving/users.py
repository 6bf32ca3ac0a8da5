"""The clicks that the endpoint stores of its users, for callers that send no history."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Protocol

from karma_ray.retrieval.requests import HistoryItem

MAX_USERS = 100_000
"""Users whose clicks are stored; who was not heard of for longest is forgotten."""
MAX_BYTES = 2**28
"""Memory of all stored clicks: a quarter of a gigabyte."""
CLICK_BYTES = 300
"""Memory of a click beside its texts."""


class UserStore(Protocol):
    """Where the clicks of users are stored: in this process, or where all replicas see them.

    Both calls raise Overloaded when the store cannot be reached.
    """

    async def append(self, user_id: str, click: HistoryItem, keep: int) -> list[HistoryItem]:
        """Store a click; returns all clicks that are stored of this user, oldest first.

        Of a user `keep` clicks are kept, and up to twice as many until the older half is dropped at
        once: a window that slid with every click would not find its stored states.
        """
        ...

    async def history(self, user_id: str) -> list[HistoryItem]:
        """Return the stored clicks, oldest first."""
        ...


class LocalUsers:
    """In this process: gone when it ends, and not seen by other replicas."""

    def __init__(self, max_users: int = MAX_USERS, max_bytes: int = MAX_BYTES) -> None:
        """Users not heard of for longest are forgotten beyond either bound."""
        self._max_users, self._max_bytes = max_users, max_bytes
        self._clicks: OrderedDict[str, list[HistoryItem]] = OrderedDict()
        self.num_bytes = 0
        """What is stored takes, about."""

    async def append(self, user_id: str, click: HistoryItem, keep: int) -> list[HistoryItem]:
        """Store a click as `UserStore` says."""
        clicks = self._clicks.setdefault(user_id, [])
        clicks.append(click)
        self.num_bytes += _size(click)
        if len(clicks) >= 2 * keep:
            old = len(clicks) - keep
            self.num_bytes -= sum(map(_size, clicks[:old]))
            del clicks[:old]
        self._clicks.move_to_end(user_id)
        while len(self._clicks) > self._max_users or (
            self.num_bytes > self._max_bytes and len(self._clicks) > 1
        ):
            self.num_bytes -= sum(map(_size, self._clicks.popitem(last=False)[1]))
        return list(clicks)

    async def history(self, user_id: str) -> list[HistoryItem]:
        """Return the stored clicks, oldest first."""
        return list(self._clicks.get(user_id, ()))


def _size(click: HistoryItem) -> int:
    return CLICK_BYTES + sys.getsizeof(click.item_id) + sys.getsizeof(click.query)

"""The clicks of users, where all replicas of an endpoint see them.

They are kept by one more process of the application, a deployment of Serve: Serve starts it with
the replicas, replaces it when it is lost, and ends it with them. Only requests that name a user and
send no history ask it, so no other request waits for it.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from karma_ray.retrieval.requests import HistoryItem
from karma_ray.serving.batching import Overloaded
from karma_ray.serving.users import LocalUsers

NAME = "clicks"
"""Name of the deployment."""
WITHIN_S = 5.0
"""Seconds in which the store must answer."""
MAX_ONGOING = 10_000
"""Calls of all replicas that may wait for the store."""


def clicks_deployment() -> serve.Application:
    """Return the store as a deployment of one process."""
    deployment = serve.deployment(
        LocalUsers,
        name=NAME,
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": 0},
    )
    return deployment.bind()


class SharedUsers:
    """A `UserStore` that asks the deployment of the application in which this replica runs."""

    def __init__(self) -> None:
        """Must be called in a replica."""
        self._store = serve.get_deployment_handle(NAME, serve.get_replica_context().app_name)

    async def append(self, user_id: str, click: HistoryItem, keep: int) -> list[HistoryItem]:
        """Store a click as `UserStore` says."""
        return await _answer(self._store.append.remote(user_id, click, keep))

    async def history(self, user_id: str) -> list[HistoryItem]:
        """Return the stored clicks, oldest first."""
        return await _answer(self._store.history.remote(user_id))


async def _answer(response: Any) -> list[HistoryItem]:
    try:
        async with asyncio.timeout(WITHIN_S):
            return cast("list[HistoryItem]", await response)
    except (TimeoutError, RayError, RayServeException):
        raise Overloaded("the stored clicks cannot be reached at the moment") from None

"""A pool of equal actors that each compute one portion of the work after another.

Not Ray Data's pool: it passes what an actor is made of through the object store, from where a
restarted actor may no longer get it, as Ray warns each time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import ray
from ray.exceptions import RayTaskError

from karma_ray.cluster.accelerators import Pool
from karma_ray.errors import KarmaRayError

Portion = TypeVar("Portion", contravariant=True)
Result = TypeVar("Result", covariant=True)


class Encoder(Protocol[Portion, Result]):
    """What an actor is: it loads a model when it is made, and then encodes."""

    def __init__(self, *arguments: Any) -> None: ...

    def encode(self, portion: Portion) -> Result:
        """Return what is told of one portion."""


def encoded(
    pool: Pool, kind: type[Encoder[Portion, Result]], arguments: Sequence[Any],
    portions: Sequence[Portion],
) -> Iterator[Result]:  # fmt: skip
    """Yield what encoders made of `arguments` return for all portions, as soon as it is there.

    An encoder gets its first portion when it is ready, so that one without a place keeps nothing
    waiting. One that is lost is made again and repeats its portion. Errors of this package are
    raised as they are.
    """
    make = ray.remote(kind).options(
        num_cpus=pool.num_cpus, num_gpus=pool.num_gpus, max_restarts=-1, max_task_retries=-1,
        scheduling_strategy="SPREAD",
    )  # fmt: skip
    actors = [make.remote(*arguments) for _ in range(min(pool.size, len(portions)))]
    left, missing = deque(portions), len(portions)
    starting = {actor.__ray_ready__.remote(): actor for actor in actors}
    running: dict[ray.ObjectRef, Any] = {}
    try:
        while missing:
            (done,), _ = ray.wait([*starting, *running], num_returns=1)
            is_result = done in running
            actor = running.pop(done) if is_result else starting.pop(done)
            found = ray.get(done)
            if left:
                running[actor.encode.remote(left.popleft())] = actor
            if is_result:
                missing -= 1
                yield found
    except RayTaskError as error:
        if isinstance(error.cause, KarmaRayError):
            raise error.cause from None  # its message is all that the user needs
        raise
    finally:
        for actor in actors:
            ray.kill(actor)

"""The engines that answer, and which users each of them answers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from karma_ray.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from karma_ray.serving.engine import Engine

FIRST = "main"
"""The arm of an endpoint that serves one run."""
DRAWS = 2**64


@dataclass(frozen=True)
class Arm:
    """One side of an experiment."""

    name: str
    engine: Engine
    share: float = 1.0
    """The share of users that it answers; the first arm answers the rest."""


@dataclass(frozen=True)
class Arms:
    """What answers now. It is replaced whole, so nobody meets a half of it."""

    arms: Sequence[Arm]
    split: str = ""
    """Names the experiment, so that each experiment divides the users in its own way."""

    @property
    def first(self) -> Arm:
        """The arm of users without a name, and of those that no other arm answers."""
        return self.arms[0]

    def of(self, user_id: str | None) -> Arm:
        """Return the arm of a user, the same one in every process and at any time."""
        if user_id is None or len(self.arms) == 1:
            return self.first
        place = place_of(user_id, self.split)
        for arm in self.arms[1:]:
            if place < arm.share:
                return arm
            place -= arm.share
        return self.first


def place_of(user_id: str, split: str) -> float:
    """Return a number from 0 to 1 that depends on nothing but the user and the experiment."""
    digest = hashlib.sha256(f"{split}\0{user_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / DRAWS


def check_shares(shares: Sequence[float]) -> None:
    """Raise InputError unless the arms after the first leave users for the first."""
    if any(share <= 0 for share in shares) or sum(shares) >= 1:
        given = ", ".join(f"{100 * share:g}" for share in shares)
        raise InputError("--share", given, "must be above 0, and below 100 percent together")

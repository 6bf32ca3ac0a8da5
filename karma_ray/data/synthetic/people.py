"""The toy shop's users: personas, their tastes, their drift, and their visits.

Legend: Z personas, D departments, A attributes, U users, P result pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from karma_ray.data.synthetic.config import DAY, START, ToyShopConfig, below, random_stream
from karma_ray.data.synthetic.items import ShopItems
from karma_ray.data.synthetic.words import ATTRIBUTES, DEPARTMENTS

TASTES: dict[str, tuple[tuple[float, ...], int]] = {
    "colour": ((1.25, 1.0), 3),
    "material": ((1.25, 0.75), 2),
    "style": ((1.5, 1.0), 2),
    "brand": ((1.0, 0.75), 3),
    "price": ((1.0,), 1),
}
"""Per attribute: strengths of the liked values (multiplied by `liked_factor`) and the number of
disliked values in one department. Strengths differ, so that few items tie."""


@dataclass(frozen=True)
class Visits:
    """One row per result page, ordered by user and time."""

    user: np.ndarray  # [P] int64
    day: np.ndarray  # [P] int64
    timestamp: np.ndarray  # [P] datetime64[us], distinct over the whole shop
    persona: np.ndarray  # [P] int64: the user's persona at that time
    number: np.ndarray  # [P] int64: 0 for the user's first page, 1 for the next, and so on


def make_tastes(config: ToyShopConfig) -> dict[str, np.ndarray]:
    """Return factors [Z, D, values] per attribute, drawn separately for each department.

    A taste for navy dresses says nothing about navy rugs. Counting attributes over a whole history
    therefore mixes departments, while the persona is the same in all of them.
    """
    random = random_stream(config.seed, "tastes")
    people, departments = config.num_personas, len(DEPARTMENTS)
    tastes = {}
    for name, (strengths, disliked) in TASTES.items():
        count = len(ATTRIBUTES[name])
        # Evenly spaced rotations of a random order per department: every value is liked about as
        # often as it is disliked, so that popularity alone tells little.
        turn = np.argsort(random.random((people, departments)), axis=0, kind="stable")
        shift = turn * count // people
        place = np.argsort(random.random((departments, count)), axis=1, kind="stable")
        rank = (shift[:, :, None] + place) % count  # [Z, D, values]
        factors = np.ones(rank.shape)
        for liked, strength in enumerate(strengths):
            factors[rank == liked] = strength * config.liked_factor
        factors[rank >= count - disliked] = config.disliked_factor
        tastes[name] = factors
    return tastes


def item_weights(tastes: dict[str, np.ndarray], items: ShopItems) -> np.ndarray:
    """Return the taste factor of each item for each persona, [Z, I]."""
    department = items.department
    weights: np.ndarray = np.ones((next(iter(tastes.values())).shape[0], len(department)))
    for column, factors in enumerate(tastes.values()):
        weights = weights * factors[:, department, items.values[:, column]]
    return weights


def draw_personas(config: ToyShopConfig) -> np.ndarray:
    """Draw the persona of each user on each day, [U, num_days]."""
    random = random_stream(config.seed, "personas")
    states = np.empty((config.num_users, config.num_days), dtype=np.int64)
    states[:, 0] = below(random.random(config.num_users), config.num_personas)
    for day in range(1, config.num_days):
        switch = random.random(config.num_users) < config.switch_per_day
        drawn = below(random.random(config.num_users), config.num_personas)
        states[:, day] = np.where(switch, drawn, states[:, day - 1])
    return states


def make_visits(config: ToyShopConfig) -> Visits:
    """Draw the sessions of users, on different days, the first within the first three weeks."""
    random = random_stream(config.seed, "visits")
    users, days = config.num_users, config.num_days
    least, most = config.sessions
    count = least + below(random.random(users), most - least + 1)
    chosen = np.argsort(random.random((users, days)), axis=1, kind="stable")
    comes = np.zeros((users, days), dtype=bool)
    comes[np.repeat(np.arange(users), count), chosen[np.arange(days) < count[:, None]]] = True
    first = comes.argmax(axis=1)
    early = below(random.random(users), min(21, config.valid_day))
    comes[np.arange(users), first] = False
    comes[np.arange(users), np.minimum(first, early)] = True

    user, day = np.nonzero(comes)  # sessions, ordered by user and day
    low, high = config.pages_per_session
    pages = low + below(random.random(len(user)), high - low + 1)
    start = 8 * 3600 + below(random.random(len(user)), 13 * 3600)  # seconds after midnight
    session = np.repeat(np.arange(len(user)), pages)
    step = np.arange(len(session)) - np.repeat(np.cumsum(pages) - pages, pages)
    seconds = start[session] + 180 * step + below(random.random(len(session)), 120)
    user, day = user[session], day[session]
    # The user's number is added as microseconds, so that all pages have different times.
    offset = (seconds * 1_000_000 + user).astype("timedelta64[us]")
    number = np.arange(len(user)) - np.searchsorted(user, user)
    persona = draw_personas(config)[user, day]
    return Visits(user, day, START + day * DAY + offset, persona, number)

"""Parameters of the toy shop (METHOD 1.14)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from karma_ray.errors import InputError


@dataclass(frozen=True)
class ToyShopConfig:
    """The shop's size and rules; fixed by its floors and ceilings alone.

    Factors multiply the odds of a click and are exact in binary (small integers over powers of
    two), so the draws do not depend on the order of a sum or on a machine's `exp`.
    """

    seed: int = 0
    """Seed of everything random."""
    num_items: int = 1200
    """Items of the catalogue, the same number in each of the 12 categories."""
    num_users: int = 6000
    """Users."""
    num_days: int = 70
    """Days of logs."""
    valid_day: int = 56
    """First day of validation; the promotion code loses its meaning here."""
    test_day: int = 63
    """First day of the test."""
    sessions: tuple[int, int] = (6, 10)
    """Least and most sessions of a user, each on a day of its own."""
    pages_per_session: tuple[int, int] = (1, 4)
    """Least and most result pages of a session."""
    page_size: int = 10
    """Items of a result page, fewer where fewer match."""
    click_shares: tuple[float, float, float, float] = (0.35, 0.35, 0.20, 0.10)
    """Shares of pages with 0, 1, 2 and 3 clicks; how many says nothing about the person."""
    num_personas: int = 4
    """Latent personas; a user is one of them at any time."""
    switch_per_day: float = 0.008
    """Chance per day that the user's persona is drawn anew: interests drift."""
    liked_factor: float = 6.0
    """Factor on the odds of a click for each liked attribute value, times its strength."""
    disliked_factor: float = 0.125
    """Factor for each disliked value; the others count 1."""
    promo_share: float = 0.2
    """Share of the items whose title carries the promotion code."""
    promo_factor: float = 4.0
    """Factor of the code before `valid_day`; 1 afterwards."""
    cold_share: float = 0.15
    """Share of the items that enter the shop with validation (half) or with the test (half)."""
    rebuy_share: float = 0.2
    """Chance that a page holds an item the user clicked before, when one matches."""
    familiar_factor: float = 2.0
    """Factor of an item the user clicked on an earlier page."""
    image_size: int = 48
    """Pixels of a picture's side."""

    def __post_init__(self) -> None:
        if not 0 < self.valid_day < self.test_day < self.num_days:
            raise InputError(
                "valid_day, test_day, num_days",
                (self.valid_day, self.test_day, self.num_days),
                "must rise from above 0",
            )
        for name, (low, high) in self._bounds().items():
            value = getattr(self, name)
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            if not all(low <= number <= high for number in numbers):
                raise InputError(name, value, f"is not between {low:g} and {high:g}")
        for name in ("sessions", "pages_per_session"):
            least, most = getattr(self, name)
            if least > most:
                raise InputError(name, (least, most), "least is more than most")
        if not math.isclose(sum(self.click_shares), 1):
            raise InputError("click_shares", self.click_shares, "do not add up to 1")
        if self.page_size != len(POSITION_FACTORS):
            raise InputError(
                "page_size",
                self.page_size,
                "has no position factors",
                choices=[len(POSITION_FACTORS)],
            )

    def _bounds(self) -> dict[str, tuple[float, float]]:
        """Least and most of what has them; factors of 0 would empty pages."""
        share, factor = (0.0, 1.0), (2.0**-20, 2.0**20)
        return {
            "num_items": (240, math.inf),
            "num_users": (1, math.inf),
            "num_personas": (2, math.inf),
            "sessions": (1, self.num_days),
            "pages_per_session": (1, math.inf),
            "click_shares": share,
            "switch_per_day": share,
            "liked_factor": factor,
            "disliked_factor": factor,
            "promo_share": share,
            "promo_factor": factor,
            "cold_share": (0.0, 0.5),
            "rebuy_share": share,
            "familiar_factor": factor,
            "image_size": (8, 4096),
        }


POSITION_FACTORS = np.array([64, 56, 50, 44, 40, 36, 33, 30, 28, 26]) / 64.0
"""Odds of a click by position on the page, first to last: moderate position bias."""

START = np.datetime64("2025-01-06T00:00:00", "us")
"""Midnight (UTC) of day 0."""

DAY = np.timedelta64(86_400_000_000, "us")


def random_stream(seed: int, name: str) -> np.random.Generator:
    """An independent PCG64 stream per part, so that one part's draws do not move another's."""
    return np.random.Generator(np.random.PCG64([seed, *name.encode()]))


def below(uniforms: np.ndarray, count: int | np.ndarray) -> np.ndarray:
    """Uniform draws in [0, 1) -> integers in [0, count): same shape, int64."""
    drawn: np.ndarray = np.floor(uniforms * count).astype(np.int64)
    return drawn

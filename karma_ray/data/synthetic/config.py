"""Parameters of the toy shop (method 1.14)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from karma_ray.errors import InputError


@dataclass(frozen=True)
class ToyShopConfig:
    """Size and rules of the shop; the defaults were chosen by its floors and ceilings alone.

    Factors multiply the odds of a click. They are exact in binary (small integers over powers of
    two), so that draws do not depend on the order of a sum or on a machine's `exp`.
    """

    seed: int = 0
    """Seed of all random draws."""
    num_items: int = 1200
    """Number of items, equal in each of the 12 categories."""
    num_users: int = 6000
    """Number of users."""
    num_days: int = 70
    """Number of days with logs."""
    valid_day: int = 56
    """First day of validation, when the promotion code loses its effect."""
    test_day: int = 63
    """First day of the test."""
    sessions: tuple[int, int] = (6, 10)
    """Smallest and largest number of sessions per user, on different days."""
    pages_per_session: tuple[int, int] = (1, 4)
    """Smallest and largest number of result pages per session."""
    page_size: int = 10
    """Items per result page; fewer if fewer match."""
    click_shares: tuple[float, float, float, float] = (0.35, 0.35, 0.20, 0.10)
    """Shares of pages with 0, 1, 2 and 3 clicks, independent of the user."""
    num_personas: int = 4
    """Number of latent personas; a user has one of them at any time."""
    switch_per_day: float = 0.008
    """Probability per day that a user's persona is drawn again, so that interests drift."""
    liked_factor: float = 6.0
    """Factor on the odds of a click per liked attribute value, multiplied by its strength."""
    disliked_factor: float = 0.125
    """Factor per disliked attribute value; neutral values have factor 1."""
    promo_share: float = 0.2
    """Share of the items whose title contains the promotion code."""
    promo_factor: float = 4.0
    """Factor of the promotion code before `valid_day`; afterwards it is 1."""
    cold_share: float = 0.15
    """Share of the items that are new in validation (half) or in the test (half)."""
    rebuy_share: float = 0.2
    """Probability that a page contains an item the user clicked before, if one matches."""
    familiar_factor: float = 2.0
    """Factor of an item that the user clicked on an earlier page."""
    image_size: int = 48
    """Side of a picture in pixels."""

    def __post_init__(self) -> None:
        if not 0 < self.valid_day < self.test_day < self.num_days:
            raise InputError(
                "valid_day, test_day, num_days",
                (self.valid_day, self.test_day, self.num_days),
                "must increase and be above 0",
            )
        for name, (low, high) in self._bounds().items():
            value = getattr(self, name)
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            if not all(low <= number <= high for number in numbers):
                raise InputError(name, value, f"is not between {low:g} and {high:g}")
        for name in ("sessions", "pages_per_session"):
            least, most = getattr(self, name)
            if least > most:
                raise InputError(name, (least, most), "has a smallest number above the largest")
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
        """Return the allowed ranges; factors of 0 would leave pages without items."""
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
"""Factors on the odds of a click by position on the page, a moderate position bias."""

START = np.datetime64("2025-01-06T00:00:00", "us")
"""Midnight (UTC) of day 0."""

DAY = np.timedelta64(86_400_000_000, "us")


def random_stream(seed: int, name: str) -> np.random.Generator:
    """Return an independent PCG64 stream per part, so that parts do not affect each other."""
    return np.random.Generator(np.random.PCG64([seed, *name.encode()]))


def below(uniforms: np.ndarray, count: int | np.ndarray) -> np.ndarray:
    """Convert uniform draws in [0, 1) to integers in [0, count): same shape, int64."""
    drawn: np.ndarray = np.floor(uniforms * count).astype(np.int64)
    return drawn

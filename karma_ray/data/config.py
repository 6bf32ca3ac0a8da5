"""The configuration of preparation, which a run reads even where nothing is to be prepared."""

from __future__ import annotations

from dataclasses import dataclass

from karma_ray.data.splits import check_shares
from karma_ray.ranges import Count, CountOrZero, Share, ShareBelowOne, check_ranges


@dataclass(frozen=True)
class PrepareConfig:
    """How events become sequences and examples."""

    max_history: Count = 20
    """Largest number of history steps before the newest step of a window."""
    num_hard_negatives: CountOrZero = 8
    """Exposed but unclicked items kept per training click; examples keep all of them."""
    valid_share: ShareBelowOne = 0.1
    """Share of the clicks, before those of the test, that is used for validation."""
    test_share: ShareBelowOne = 0.1
    """Share of the clicks, the last in time, that is used for the test."""
    max_bad_share: Share = 0.2
    """Largest share of quarantined rows; with more, preparation stops."""
    num_partitions: Count = 4
    """Fewest partitions of users, each one file of the output. A large log has 2, 4, 8, ... times
    as many. Only the order of the rows depends on it."""
    seed: CountOrZero = 0
    """Seed for choosing unclicked items when a page has more than are kept, and for `hold_out`."""
    hold_out: ShareBelowOne = 0.0
    """Share of the catalogue's categories whose items leave all training clicks, histories and
    negatives; metrics under `held_out/` are those of the test clicks on them. A category is the
    last part of a path `a > b > c`."""
    max_user_events: Count = 100_000
    """Most rows of the log that are kept of one user, the newest ones, so that a robot with
    millions of pages delays nobody; the others are counted as `events_beyond_cap`."""

    def check(self) -> None:
        """Raise InputError on sizes and shares out of range."""
        check_ranges(self, "prepare")
        check_shares(self.valid_share, self.test_share)

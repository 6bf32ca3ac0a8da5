"""The global chronological split: two cutoff times that are the same for all users.

A page has one time, so a cutoff never divides it. Nothing depends on chance or today's date.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from karma_ray.errors import InputError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True)
class Cutoffs:
    """train < valid_start <= valid < test_start <= test, in microseconds since 1970 UTC."""

    valid_start: int
    test_start: int

    def iso(self) -> dict[str, str]:
        """Return both cutoffs as ISO 8601 strings."""
        return {
            "valid_start": to_datetime(self.valid_start).isoformat(),
            "test_start": to_datetime(self.test_start).isoformat(),
        }


def to_datetime(microseconds: int) -> datetime:
    """Convert microseconds since 1970 to a UTC datetime."""
    return _EPOCH + microseconds * _MICROSECOND


def to_microseconds(value: object, field: str) -> int:
    """Convert an ISO 8601 string or datetime (default zone UTC) to microseconds."""
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        raise InputError(field, value, "is not an ISO 8601 time") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // _MICROSECOND


def choose_cutoffs(
    times: np.ndarray,
    counts: np.ndarray,
    valid_share: float,
    test_share: float,
    planned: Mapping[str, Any] | None = None,
) -> Cutoffs:
    """Choose the cutoffs from the times [n] int64 of clicks and the number of clicks at each.

    The last `test_share` of the clicks is the test set, and the `valid_share` before it the
    validation set; clicks at the time of a cutoff are all after it. `valid_start` and `test_start`
    in `planned` (a data manifest) take precedence. Raises InputError when no click is left to
    train on.
    """
    check_shares(valid_share, test_share)
    if times.size == 0:
        raise InputError("events", 0, "clicks on items of the catalogue: nothing to prepare")
    order = np.argsort(times, kind="stable")
    times, reached = times[order], np.cumsum(counts[order])
    planned = planned or {}
    cuts = {
        "valid_start": _quantile(times, reached, 1.0 - valid_share - test_share),
        "test_start": _quantile(times, reached, 1.0 - test_share),
    }
    if valid_share > 0 and cuts["valid_start"] == cuts["test_start"]:
        # Both quantiles fall on one time: validate on the time before it, to have any example.
        earlier = times[times < cuts["test_start"]]
        cuts["valid_start"] = int(earlier[-1]) if earlier.size else cuts["valid_start"]
    for name in cuts:
        if planned.get(name) is not None:
            cuts[name] = to_microseconds(planned[name], f"manifest {name}")
    cutoffs = Cutoffs(**cuts)
    if cutoffs.valid_start > cutoffs.test_start:
        raise InputError("valid_start", cutoffs.iso()["valid_start"], "lies after test_start")
    if times[0] >= cutoffs.valid_start:
        raise InputError(
            "valid_start", cutoffs.iso()["valid_start"], "leaves no click before it to train on"
        )
    return cutoffs


def check_shares(valid_share: float, test_share: float) -> None:
    """Raise InputError unless both shares are in [0, 1) and leave something to train on."""
    for name, share in (("valid_share", valid_share), ("test_share", test_share)):
        if not 0.0 <= share < 1.0:
            raise InputError(f"prepare.{name}", share, "is not in [0, 1)")
    if valid_share + test_share >= 1.0:
        raise InputError(
            "prepare.valid_share", valid_share, f"leaves no clicks to train on beside {test_share}"
        )


def _quantile(times: np.ndarray, reached: np.ndarray, share: float) -> int:
    """Return the time of the first click beyond a share, or one past the last click."""
    # Rounded first: 1 - 0.1 - 0.1 of 10 clicks must be 8 clicks, not 7.999...
    place = int(np.searchsorted(reached, round(share * float(reached[-1]), 6), side="right"))
    return int(times[place]) if place < times.size else int(times[-1]) + 1

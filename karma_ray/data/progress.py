"""How far long work has come, how fast it is and how long the rest will take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

LOG = logging.getLogger(__name__)
EVERY_S = 30.0
"""Time between two lines where there is no terminal to draw a bar on."""
Done = TypeVar("Done")


def told(
    parts: Iterable[Done], items_of: Callable[[Done], int], total: int, purpose: str,
    every: float = EVERY_S,
) -> Iterator[Done]:  # fmt: skip
    """Yield parts as they are done, and tell of it: a bar on a terminal, lines elsewhere.

    The first part is not counted in the speed, since those who work on it start first.
    """
    bar = tqdm(total=total, unit="item", desc=purpose, disable=None)
    done, first, began, spoke = 0, 0, time.monotonic(), time.monotonic()
    with bar:
        for part in parts:
            done += items_of(part)
            bar.update(items_of(part))
            now = time.monotonic()
            if not first:
                first, began = done, now
            elif bar.disable and now > began and (now - spoke >= every or done >= total):
                speed = (done - first) / (now - began)
                left = tqdm.format_interval((total - done) / speed) if speed else "?"
                LOG.info("%s: %d of %d items, %.1f items/s, %s left",
                         purpose, done, total, speed, left)  # fmt: skip
                spoke = now
            yield part

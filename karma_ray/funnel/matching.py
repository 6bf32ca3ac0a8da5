"""The matching output without KARMA: lists of several channels, merged round by round.

Both stages begin here: pre-ranking takes its candidates from the merged list, so that no vectors
choose them, and recall shows what an interest vector adds to it. Blocks are stored, so that every
run is measured on the same lists and an interrupted report goes on.

Legend: b requests of a block, C channels, M length of a list, I items, P candidates.
"""

from __future__ import annotations

import io
import logging
import time
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from karma_ray.artifacts import (
    content_hash,
    exists,
    join,
    read_bytes,
    read_json,
    remove,
    value_hash,
    write_bytes,
    write_json,
)
from karma_ray.baselines.floors import build_floor
from karma_ray.baselines.popularity import CLICK_COLUMNS, training_clicks
from karma_ray.baselines.ranker import Ranker
from karma_ray.data.catalog import Catalog
from karma_ray.data.prepared import PreparedData
from karma_ray.evaluation.measurement import tie_order
from karma_ray.funnel.requests import Clicks
from karma_ray.funnel.sizes import Sizes
from karma_ray.metrics.ranking import pessimistic_ranks, top_rows

LOG = logging.getLogger(__name__)
CHANNELS = ("bm25", "affinity", "popularity")
"""The other channels, in the order in which they take turns."""
VERSION = 1
"""Raised when the lists of the same data change."""
SECONDS = 10.0
"""Time between two lines of progress."""
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Matched:
    """What the channels found for a block of requests."""

    rows: Rows
    """[b, M] the merged list, best first; -1 after its end."""
    turns: Rows
    """[b, M] when each item's turn was: its rank, times C + 1, plus its channel's number."""
    affinity: NDArray[np.float32]
    """[b, P] the affinity of the first P items of the merged list."""
    ranks: Rows
    """[b, C] the target's rank by each channel alone, ties counted against it."""

    def packed(self) -> bytes:
        """Return the content of an .npz file."""
        sink = io.BytesIO()
        rows, turns = self.rows.astype(np.int32), self.turns.astype(np.int32)
        np.savez(sink, rows=rows, turns=turns, affinity=self.affinity, ranks=self.ranks)
        return sink.getvalue()

    @classmethod
    def unpacked(cls, content: bytes) -> Matched:
        """Invert `packed`."""
        with np.load(io.BytesIO(content)) as file:
            of = {name: file[name] for name in file.files}
        rows, turns = of["rows"].astype(np.int64), of["turns"].astype(np.int64)
        return cls(rows, turns, of["affinity"], of["ranks"])


class Matching:
    """The stored lists of a data set; blocks that are missing are made."""

    def __init__(self, source: PreparedData, catalog: Catalog, sizes: Sizes, folder: str) -> None:
        self.sizes, self.folder = sizes, folder
        self.clicks = training_clicks(source.windows(*CLICK_COLUMNS), catalog)  # [I]
        self.priority = catalog.derived(tie_order)  # [I]
        self._source = source
        self._rankers: dict[str, Ranker] = {}
        self._key = value_hash(
            [VERSION, CHANNELS, asdict(sizes), content_hash(join(source.uri, "examples")),
             content_hash(join(source.uri, "sequences")), catalog.num_items]
        )  # fmt: skip
        self._last = time.monotonic()

    def block(self, clicks: Clicks, block: slice) -> Matched:
        """Return the lists of a block of clicks, stored or made now."""
        name = f"{clicks.split}-{len(clicks.targets)}-{block.start:09d}-{block.stop:09d}.npz"
        path = join(self.folder, self._key, name)
        if exists(path):
            return Matched.unpacked(read_bytes(path))
        found = self._matched(clicks, block)
        write_bytes(found.packed(), path)
        if time.monotonic() - self._last > SECONDS:
            self._last = time.monotonic()
            LOG.info("matched %d of %d %s clicks", block.stop, len(clicks.targets), clicks.split)
        return found

    def check(self) -> None:
        """Remove the lists of other data or sizes, which this report can no longer use."""
        path = join(self.folder, "key.json")
        if exists(path) and read_json(path) != self._key:
            remove(self.folder)
        write_json(self._key, path)

    def _ranker(self, name: str) -> Ranker:
        if name not in self._rankers:
            LOG.info("channel %s", name)
            self._rankers[name] = build_floor(name, self._source)
        return self._rankers[name]

    def _matched(self, clicks: Clicks, block: slice) -> Matched:
        examples = clicks.examples.slice(block.start, block.stop - block.start)
        lists, ranks, affinity = [], [], np.zeros(0)
        for name in CHANNELS:
            scores = np.asarray(self._ranker(name).score(examples))
            ranks.append(pessimistic_ranks(scores, clicks.targets[block]))
            lists.append(best_rows(scores, self.sizes.merged, self.priority, name != "affinity"))
            affinity = scores if name == "affinity" else affinity
        rows, turns = merged(np.stack(lists), self.sizes.merged)
        pool = rows[:, : self.sizes.pool]
        chosen = np.take_along_axis(affinity, pool, axis=1)
        return Matched(rows, turns, chosen.astype(np.float32), np.stack(ranks, axis=1))


def best_rows(
    scores: NDArray[np.floating], k: int, priority: Rows, only_positive: bool
) -> Rows:  # [b, I], [I] -> [b, k]
    """Return the k best rows of each request, best first, ties in the order of `priority`.

    With `only_positive` a list ends (with -1) where the scores are 0: a channel does not return
    items that share no word with the request, or that nobody ever clicked.
    """
    alike = scores.strides[0] == 0  # one row for all requests
    values = scores[:1] if alike else scores
    found = top(values, k, priority)
    if only_positive:
        found = np.where(np.take_along_axis(values, found, axis=1) > 0, found, -1)
    return np.broadcast_to(found, (len(scores), found.shape[1])) if alike else found


def top(scores: NDArray[np.floating], k: int, priority: Rows) -> Rows:  # [b, I] -> [b, k]
    """Return the k best rows without knowing the target; ties in the order of `priority`."""
    return top_rows(scores, k, np.full(len(scores), -1, np.int64), priority)


def merged(lists: Rows, size: int) -> tuple[Rows, Rows]:  # [C, b, M] -> [b, size], [b, size]
    """Merge the channels' lists: in every round each gives its next item, in their order.

    Returns rows and turns (rank x (C + 1) + 1 + channel's number). An item that several channels
    give counts once, at its first turn; -1 follows the end of a list.
    """
    channels, num, length = lists.shape
    turns = np.arange(length)[:, None] * (channels + 1) + 1 + np.arange(channels)
    flat, turn = lists.transpose(1, 2, 0).reshape(num, -1), turns.reshape(-1)
    return first_of_each(flat, np.broadcast_to(turn, flat.shape), size)


def joined(own: Rows, matched: Matched, size: int) -> Rows:  # [b, M] -> [b, size]
    """Merge one more channel, whose turn is first in every round, into lists of the same size."""
    step = len(CHANNELS) + 1
    turns = np.broadcast_to(np.arange(own.shape[1]) * step, own.shape)
    rows = np.concatenate([own, matched.rows], axis=1)
    return first_of_each(rows, np.concatenate([turns, matched.turns], axis=1), size)[0]


def first_of_each(rows: Rows, turns: Rows, size: int) -> tuple[Rows, Rows]:
    """Order each request's rows [b, N] by turn, without repetitions and -1; the first `size`."""
    found = np.full((2, len(rows), size), -1, np.int64)
    for number, (items, turn) in enumerate(zip(rows, turns, strict=True)):
        order = np.argsort(turn, kind="stable")
        order = order[items[order] >= 0]
        first = np.sort(np.unique(items[order], return_index=True)[1])[:size]
        found[0, number, : len(first)] = items[order[first]]
        found[1, number, : len(first)] = turn[order[first]]
    return found[0], found[1]

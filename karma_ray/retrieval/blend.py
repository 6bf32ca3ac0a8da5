"""The blend of the model's list and the channels': one linear score of a handful of features.

The candidates of a request are the union of all lists. Every candidate gets every channel's score,
exactly, whichever list it was found by, and its rank in each list. Weights of scores make a
logistic model of the click among the candidates; weights of reciprocal ranks alone are reciprocal
rank fusion (Cormack et al., SIGIR 2009). Requests with and without a history have weights of their
own. An item without a training click has a feature of its own, which says at most that it is as
popular as others: where a catalogue was made from a log, such items are there because somebody
clicked them later, so a model that may prefer them would learn from the future.

Legend: I items, A items added since the index was made, C candidates, F features, T steps of a
history.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from karma_ray.retrieval.channels import CHANNELS, among

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from karma_ray.retrieval.channels import Asked, Channels

    Rows = NDArray[np.int64]
    Mask = NDArray[np.bool_]
    Values = NDArray[np.float64]

DENSE = "dense"
LISTS = (DENSE, *CHANNELS)
SCORES = (
    DENSE, "bm25_query", "bm25_history", "affinity", "clicks", "clicks_or_mean", "matches", "seen",
)  # fmt: skip
"""Of each candidate: the model's score, BM25 of the query and of the history, the affinity's
log-odds, log(1 + training clicks), the same with the mean of clicked items for one without clicks,
whether it matches the query, and log(1 + its clicks in the history)."""
FREE = ("seen",)
"""Features whose weight may be below 0: what was bought once may be wanted again, or never."""
RECIPROCAL = tuple(f"rank_{name}" for name in LISTS)
"""Of each list: 1 / (60 + rank), 0 outside the list."""
OF_LIST = {
    DENSE: (DENSE, f"rank_{DENSE}"),
    "bm25": ("bm25_query", "bm25_history", "rank_bm25"),
    "affinity": ("affinity", "rank_affinity"),
    "popularity": ("clicks", "clicks_or_mean", "rank_popularity"),
}
"""The features that each list brings."""
FEATURES = (*SCORES, *RECIPROCAL)
BY_CONTENT = ("bm25", "affinity")
"""Lists of what an item is, not of how often it was clicked."""
RANK_OFFSET = 60.0
GROUPS = ("warm", "cold")
"""Requests with a history that the catalogue knows, and those without."""


@dataclass(frozen=True)
class Blend:
    """Weights of the features for requests with and without a history."""

    kind: str
    """`logistic`, `reciprocal_ranks` or `dense`."""
    weights: Mapping[str, Mapping[str, float]]
    """group -> feature -> weight; features that are not named have weight 0."""
    is_served: bool = False
    """Whether validation says that the blend should answer unless told otherwise."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """What validation said."""
    without: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    """The weights that were fitted without each of the lists, to know what it adds."""

    @property
    def verdict(self) -> str:
        """Which lists answer, and what validation said, in one line."""
        who = "the blend of all lists" if self.is_served else "the model alone"
        if not self.measured:
            return f"recall answers by {who}: validation has too few clicks to compare"
        rates, depth = self.measured["HR"], self.measured["depth"]
        gain = (self.measured[name] for name in ("gain", "low", "high"))
        points = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*gain)
        return (
            f"recall answers by {who}: HR@{depth} on validation is {rates[self.kind]:.1f} blended "
            f"and {rates[DENSE]:.1f} by the model alone ({points} over users)"
        )

    def is_dense(self, group: str) -> bool:
        """Whether the order is that of the model's score, so that nothing need be blended."""
        heavy = {name for name, weight in self.weights[group].items() if weight}
        return heavy in ({DENSE}, {f"rank_{DENSE}"})

    def scores(self, group: str, features: Values) -> Values:  # [C, F] -> [C]
        """Return the blended scores."""
        return features @ self.vector(group)

    def vector(self, group: str) -> Values:  # [F]
        """Return the weights in the order of `FEATURES`."""
        named = self.weights[group]
        return np.array([named.get(name, 0.0) for name in FEATURES])

    def to_json(self) -> dict[str, Any]:
        """Return what a manifest holds."""
        return asdict(self)


def group_of(asked: Asked) -> str:
    """Return the group of a request."""
    return GROUPS[0] if len(asked.history) else GROUPS[1]


def candidates(lists: Mapping[str, Rows]) -> Rows:  # -> [C]
    """Return the rows of all lists, ascending."""
    rows = np.sort(np.concatenate([lists[name] for name in LISTS]))
    first = np.ones(len(rows), bool)
    np.not_equal(rows[1:], rows[:-1], out=first[1:])
    found: Rows = rows[first]
    return found


@dataclass(frozen=True)
class Added:
    """What the channels are asked in place of the items that they do not know yet."""

    first: int
    """Row of the first added item; the channels know those before it."""
    rows: Rows  # [A] what the item was before it was described anew, or the item nearest to it
    is_same: Mask  # [A] whether it is the same item

    def known(self, rows: Rows) -> tuple[Rows, Mask]:  # [n] -> [n], [n]
        """Return rows that the channels know, and which of them are the items themselves."""
        at, own = rows.copy(), np.ones(len(rows), bool)
        new = np.flatnonzero(rows >= self.first)
        at[new] = self.rows[rows[new] - self.first]
        own[new] = self.is_same[rows[new] - self.first]
        return at, own

    @cached_property
    def renamed(self) -> tuple[Rows, Rows]:
        """The rows, ascending, of items before they were described anew, and those they have."""
        now = np.flatnonzero(self.is_same)
        order = np.argsort(self.rows[now])
        return self.rows[now[order]], now[order] + self.first

    def current(self, rows: Rows) -> Rows:  # [n] -> [n]
        """Return the rows that items of a channel's list have now."""
        before, now = self.renamed
        if not len(before):
            return rows
        places = np.minimum(np.searchsorted(before, rows), len(before) - 1)
        found: Rows = np.where(before[places] == rows, now[places], rows)
        return found


def features(
    channels: Channels, asked: Asked, lists: Mapping[str, Rows], rows: Rows, dense: Values,
    added: Added | None = None,
) -> Values:  # [C], [C] -> [C, F]  # fmt: skip
    """Return the features of candidate rows, ascending, with the model's scores `dense`.

    An added item has what the channels say of the item that stands for it, but none of its clicks.
    """
    at, tastes = rows, channels.tastes
    own: Mask | None = None
    if added is not None and len(rows) and rows[-1] >= added.first:
        at, own = added.known(rows)
    found = np.zeros((len(rows), len(FEATURES)))
    found[:, 0] = dense
    found[:, 1] = asked.by_query[at]
    found[:, 2] = asked.by_history[at]
    if len(asked.history):
        found[:, 3] = tastes.affinity(asked.gains, at)
    clicks = np.log1p(tastes.clicks[at])
    if own is not None:
        clicks[~own] = 0.0
    found[:, 4] = clicks
    found[:, 5] = np.where(clicks > 0, clicks, tastes.mean_log_clicks)
    if asked.matches is not None:
        found[:, 6] = among(at, asked.matches)
    if len(asked.history):
        seen, counts = np.unique(asked.history, return_counts=True)
        is_seen = among(at, seen) if own is None else among(at, seen) & own
        there = np.flatnonzero(is_seen)
        found[there, 7] = np.log1p(counts[np.searchsorted(seen, at[there])])
    for column, name in enumerate(LISTS, len(SCORES)):
        places = np.searchsorted(rows, lists[name])
        found[places, column] = 1.0 / (RANK_OFFSET + 1.0 + np.arange(len(places)))
    if own is not None:
        new = np.flatnonzero(~own)
        places = np.searchsorted(rows, at[new])
        there = rows[places] == at[new]  # an added row is the last, so every place is one
        for name in BY_CONTENT:
            column = FEATURES.index(f"rank_{name}")
            found[new[there], column] = found[places[there], column]
    return found

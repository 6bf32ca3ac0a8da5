"""Search by all lists: the model's and the channels', merged by a blend's weights.

The items beyond the candidates follow in the order of the model's scores, so every request gets as
many items as without channels.

Legend: B requests, C candidates, D width, F features, I items, K vectors of a request, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from karma_ray.artifacts import RunFolder, exists, read_manifest
from karma_ray.errors import InputError
from karma_ray.retrieval.blend import DENSE, GROUPS, Added, Blend, candidates, features, group_of
from karma_ray.retrieval.channels import DEPTH, KIND, Channels
from karma_ray.retrieval.delta import UpdatedSearch
from karma_ray.retrieval.exact import ExactSearch
from karma_ray.retrieval.filters import Filter, filtered_search
from karma_ray.retrieval.parts import channels_of, served

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from karma_ray.retrieval.requests import Request
    from karma_ray.retrieval.retriever import Retriever

    Rows = NDArray[np.int64]
    Vectors = NDArray[np.float32]
    Mask = NDArray[np.bool_]

MODES = ("auto", "blend", DENSE)


class Found(NamedTuple):
    """The candidates of a request."""

    group: str
    rows: Rows  # [C] ascending
    features: NDArray[np.float64]  # [C, F]


@dataclass(frozen=True)
class Order:
    """Rows of a retriever's table and of its index, where these are not the same."""

    table_rows: Rows | None = None  # [I]
    """The row of the table for each of the index."""
    index_rows: Rows | None = None  # [I]
    """The row of the index for each of the table."""

    @classmethod
    def of(cls, retriever: Retriever) -> Order:
        """Compare the ids; an endpoint's table has the order of its index."""
        table, index = retriever.table, retriever.index
        if table.item_ids is index.item_ids or table.item_ids == index.item_ids:
            return cls()
        rows = table.rows(index.item_ids)
        back = np.full(table.num_items, -1, np.int64)
        back[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
        return cls(rows, back)

    def of_index(self, rows: Rows) -> Rows:
        """Return the index rows of table rows; -1 stays -1."""
        return rows if self.index_rows is None else np.where(rows < 0, -1, self.index_rows[rows])

    def of_table(self, rows: Rows) -> Rows:
        """Return the table rows of index rows."""
        return rows if self.table_rows is None else self.table_rows[rows]


@dataclass(frozen=True)
class BlendedSearch:
    """Channels and the weights that blend them with the model."""

    channels: Channels
    blend: Blend
    order: Order = Order()
    added: Added | None = None
    """What stands for the items that were added since the index was made."""

    @classmethod
    def of(cls, channels: Channels, blend: Blend, retriever: Retriever) -> BlendedSearch:
        """Return the search of a retriever, whose index may have a delta."""
        return cls(channels, blend, Order.of(retriever), stand_ins(retriever))

    def search(
        self, retriever: Retriever, vectors: Vectors, requests: Sequence[Request],
        filters: Sequence[Filter], ks: Sequence[int],
    ) -> list[tuple[list[int], list[float]]]:  # fmt: skip
        """Return rows and scores of the best items, as `filtered_search` does; [B, K, D]."""
        depths = [max(k, DEPTH) for k in ks]
        dense = filtered_search(retriever.index, vectors, filters, depths)
        answers = []
        for request, one, filter_, k, found in zip(
            requests, vectors, filters, ks, dense, strict=True
        ):
            history = self.history([click.item_id for click in request.history], retriever)
            if self.blend.is_dense(GROUPS[0] if len(history) else GROUPS[1]):
                answers.append((found[0][:k], found[1][:k]))
                continue
            allowed = self.allowed(retriever, filter_)
            some = self.found(retriever, one, request.query, history, found[0], allowed)
            answers.append(self.merged(some, found, k))
        return answers

    def found(
        self, retriever: Retriever, vectors: Vectors, query: str | None, history: Rows,
        dense: Sequence[int], allowed: Mask | None = None,
    ) -> Found:  # fmt: skip
        """Return the candidates of one request; `vectors` [K, D], `history` [T] index rows.

        `dense` are the best rows by the model, best first; `allowed` [I] says which may be found.
        """
        asked = self.channels.asked(query, history)
        lists = self.channels.lists(asked, allowed)
        if self.added is not None:
            lists = {name: self.added.current(rows) for name, rows in lists.items()}
        lists[DENSE] = np.array(dense[:DEPTH], np.int64)
        rows = candidates(lists)
        scores = dense_scores(retriever, vectors, rows, self.order)
        return Found(group_of(asked), rows, features(
            self.channels, asked, lists, rows, scores, self.added
        ))  # fmt: skip

    def history(self, item_ids: Sequence[str], retriever: Retriever) -> Rows:  # -> [T]
        """Return the index rows of a history's items, without items that are new to the channels.

        One that was described anew is the one that they know.
        """
        rows = self.order.of_index(retriever.table.rows(item_ids))
        rows = rows[rows >= 0]
        if self.added is not None:
            rows, own = self.added.known(rows)
            rows = rows[own]
        return rows

    def allowed(self, retriever: Retriever, wanted: Filter) -> Mask | None:  # -> [I]
        """Return which rows of the channels may answer; None if all may."""
        index, engine = retriever.index, retriever.index.engine
        hidden = engine.hidden if isinstance(engine, UpdatedSearch) else ()
        if wanted.category is None and not wanted.exclude and not len(hidden):
            return None
        mask = np.ones(index.num_items, bool)
        if wanted.category is not None:
            mask = index.of_category(wanted.category).copy()
        mask[np.asarray(hidden, np.int64)] = False
        excluded = self.order.of_index(retriever.table.rows(sorted(wanted.exclude)))
        mask[excluded[excluded >= 0]] = False
        if self.added is not None:
            before, now = self.added.renamed
            mask[before] = mask[now]
        return mask[: self.channels.num_items]

    def merged(
        self, found: Found, dense: tuple[Sequence[int], Sequence[float]], k: int
    ) -> tuple[list[int], list[float]]:
        """Return the best candidates, then what the model finds beyond them."""
        values = self.blend.scores(found.group, found.features)
        order = np.lexsort((found.rows, -found.features[:, 0], -values))[:k]
        rows, scores = found.rows[order].tolist(), values[order].tolist()
        if len(rows) < k:
            there = set(rows)
            rest = [pair for pair in zip(*dense, strict=True) if pair[0] not in there]
            lowest = (scores[-1] if scores else 0.0) - (rest[0][1] if rest else 0.0)
            rows += [row for row, _ in rest][: k - len(order)]
            scores += [lowest + score for _, score in rest][: k - len(order)]
        return rows, scores


def stand_ins(retriever: Retriever) -> Added | None:
    """Return what stands for the items of a delta: themselves before they were described anew, or
    the item that the index finds first for their own vector."""
    engine, ids = retriever.index.engine, retriever.index.item_ids
    if not isinstance(engine, UpdatedSearch) or not len(engine.added):
        return None
    nearest = replace(engine, added=engine.added[:0]).search(engine.added, 1)[1][:, 0]
    before = {ids[row]: row for row in engine.hidden.tolist()}
    own = np.array([before.get(item, -1) for item in ids[engine.num_main :]], np.int64)
    stand = np.where(own >= 0, own, np.maximum(nearest, 0))
    return Added(engine.num_main, stand, own >= 0)


def dense_scores(
    retriever: Retriever, vectors: Vectors, rows: Rows, order: Order
) -> NDArray[np.float64]:  # [K, D], [C] -> [C]
    """Return the model's scores of rows of the index, those of an exact search."""
    engine = retriever.index.engine
    if isinstance(engine, ExactSearch):
        found = engine.vectors.take(rows, 0)
    else:
        at = torch.from_numpy(order.of_table(rows)).to(retriever.device)
        with torch.inference_mode():
            items = retriever.interest.index_vectors(retriever.embeddings[at])
            found = items.float().cpu().numpy()
    # In float64 first, so that a score does not depend on how many are computed together.
    scores = found.astype(np.float64) @ vectors.T.astype(np.float64)
    return np.asarray(scores.max(1).astype(np.float32), np.float64)


def with_channels(retriever: Retriever, run: str | RunFolder, mode: str = "auto") -> Retriever:
    """Let a retriever answer by all lists, if the run has channels and `mode` says so.

    `auto` does where validation says that the blend is better. Raises InputError if `blend` is
    asked for and there are no channels, SkewError if they are of another index.
    """
    if mode not in MODES:
        raise InputError("--channels", mode, choices=MODES)
    folder = served(run)
    if mode == DENSE or not exists(f"{channels_of(folder)}/manifest.json"):
        if mode == "blend":
            problem = "needs channels/, which `python jobs/index.py RUN` writes from the run's data"
            raise InputError("--channels", mode, problem)
        return retriever
    search = load_blended(folder, retriever)
    if mode == "blend" or search.blend.is_served:
        retriever.blended = search
    return retriever


def load_blended(folder: RunFolder, retriever: Retriever) -> BlendedSearch:
    """Load the channels of a run with their weights; raises SkewError if of another index."""
    made = read_manifest(folder.index, "index")["content_hash"]
    channels = Channels.load(channels_of(folder), made)
    blend = Blend(**read_manifest(channels_of(folder), KIND)["weights"])
    return BlendedSearch.of(channels, blend, retriever)

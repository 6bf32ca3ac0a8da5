"""The recall stage: lists of h_t by the served index and exactly, and what they add to others.

HR is the share of clicks whose item is in a list of K out of the whole catalogue (method 1.13).
What is scored and searched is the code of the endpoint: `Retriever` and `filtered_search`.

Legend: b requests of a block, K length of a list, I items.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from karma_ray.data.catalog import Catalog
from karma_ray.data.held_out import leaf
from karma_ray.errors import InputError
from karma_ray.evaluation.measurement import block_scores
from karma_ray.funnel.matching import CHANNELS, SECONDS, Matching, joined
from karma_ray.funnel.outcomes import UserSums
from karma_ray.funnel.requests import Clicks
from karma_ray.metrics.ranking import hit
from karma_ray.retrieval.filters import Filter, filtered_search
from karma_ray.retrieval.index import ItemIndex
from karma_ray.retrieval.index_build import MIN_RECALL
from karma_ray.retrieval.index_recall import ProbeQueries
from karma_ray.retrieval.kinds import InvertedLists
from karma_ray.retrieval.retriever import Retriever, score_vectors

LOG = logging.getLogger(__name__)
NUM_PROBES = 512
"""Validation requests that decide how much of an approximate index is searched."""
Rows = NDArray[np.int64]
Floats = NDArray[np.float64]


class Categories:
    """The share of a list that has the category of the clicked item (a proxy of P_good)."""

    def __init__(self, catalog: Catalog) -> None:
        names = [leaf(name) for name in catalog.categories or []]
        self.codes = np.unique(np.array(names), return_inverse=True)[1] if names else None  # [I]
        self._named = np.array([bool(name) for name in names])

    def match(self, lists: Rows, targets: Rows) -> Floats:  # [b, K], [b] -> [b]
        """Return the share of each list; only where `measured`."""
        assert self.codes is not None, "asked of a catalogue with categories"
        same = self.codes[lists] == self.codes[np.maximum(targets, 0)][:, None]
        count = np.maximum((lists >= 0).sum(axis=1), 1)
        share: Floats = (same & (lists >= 0)).sum(axis=1) / count
        return share

    def measured(self, targets: Rows) -> Floats:  # [b] -> [b]
        """Return 1 for targets with a category, else 0."""
        known: Floats = (targets >= 0) & self._named[np.maximum(targets, 0)]
        return known.astype(np.float64)


def others_recall(matching: Matching, test: Clicks, categories: Categories) -> UserSums:
    """Measure the channels without KARMA: each alone, and their merged list."""
    found = _Values(test, categories)
    k = matching.sizes.recalled
    for block in test.blocks():
        matched = matching.block(test, block)
        for number, name in enumerate(CHANNELS):
            found.add(name, hit(matched.ranks[:, number], k))
        found.add_list("union", matched.rows[:, :k], block)
    return found.sums()


def run_recall(
    retriever: Retriever, matching: Matching, valid: Clicks, test: Clicks, categories: Categories,
) -> tuple[UserSums, dict[str, Any]]:  # fmt: skip
    """Measure one run's lists; returns sums per user and facts on its approximate index."""
    k, found, last = matching.sizes.recalled, _Values(test, categories), time.monotonic()
    index, facts = approximate_index(retriever, valid)
    nobody = np.full(test.num_items, -1, np.int64)
    for block in test.blocks():
        examples = test.examples.slice(block.start, block.stop - block.start)
        targets = test.targets[block]
        scores = block_scores(retriever, examples)
        found.add("exact", hit(scores.pessimistic_ranks(targets), k))
        own = scores.top_rows(k, nobody[: len(targets)], matching.priority)
        near, values = _searched(retriever, index, examples, k)
        least = np.asarray(scores.at(np.arange(len(own)), own[:, -1]))[:, None]
        found.add("ann", _holds(near, targets))
        # An item that scores as high as the last exact one counts, as duplicates are as good.
        good = values >= least - 1e-5 * np.abs(least) - 1e-6
        found.add("ann_overlap", good.mean(axis=1))
        found.add_category("category_match", own, block)
        found.add_list("union", joined(own, matching.block(test, block), k), block)
        if time.monotonic() - last > SECONDS:
            last = time.monotonic()
            LOG.info("recall: %d of %d clicks", block.stop, len(test.targets))
    return found.sums(), facts


def approximate_index(retriever: Retriever, valid: Clicks) -> tuple[ItemIndex, dict[str, Any]]:
    """Return the run's own index if it is approximate, else lists of cells as `jobs/index.py`
    builds them: searched wide enough for MIN_RECALL on validation requests."""
    if not retriever.index.is_exact:
        return retriever.index, _index_facts(retriever.index)
    table = retriever.table
    count = min(NUM_PROBES, len(valid.targets))
    rows = np.linspace(0, len(valid.targets) - 1, count).astype(int)
    probes = search_vectors(retriever, valid.examples.take(rows)).reshape(-1, retriever.width)
    try:
        index = ItemIndex.build(
            score_vectors(retriever.interest, table), table.item_ids, table.titles,
            InvertedLists(), probes=ProbeQueries(probes, f"{count} validation requests"),
            min_recall=MIN_RECALL, raise_recall=True,
        )  # fmt: skip
    except InputError as error:
        LOG.warning("%s; the approximate list is the exact one", error)
        index = retriever.index
    return index, _index_facts(index)


def search_vectors(retriever: Retriever, examples: Any) -> NDArray[np.float32]:  # [b, K, D]
    """Return what the endpoint searches with."""
    model = retriever.interest
    keys = retriever.keys(examples) if model.is_random else None
    with torch.inference_mode():
        found = model.search_vectors(retriever.interests(examples), keys)
    vectors: NDArray[np.float32] = found.float().cpu().numpy()
    return vectors


def _searched(
    retriever: Retriever, index: ItemIndex, examples: Any, k: int
) -> tuple[Rows, NDArray[np.float32]]:  # [b, k], [b, k]
    """Return the rows of the table that an index finds, and their scores; row -1 means none."""
    vectors = search_vectors(retriever, examples)
    answers = filtered_search(index, vectors, [Filter()] * len(vectors), [k] * len(vectors))
    rows = np.full((len(vectors), k), -1, np.int64)
    scores = np.full(rows.shape, -np.inf, np.float32)
    for number, (places, values) in enumerate(answers):
        rows[number, : len(places)], scores[number, : len(places)] = places, values
    if index.item_ids is not retriever.table.item_ids:
        rows = np.append(retriever.table.rows(index.item_ids), -1)[rows]
    return rows, scores


def _holds(lists: Rows, targets: Rows) -> Floats:  # [b, K], [b] -> [b]
    """Return 1 where a target is in its list, else 0; a target of -1 is in none."""
    inside: Floats = ((lists == targets[:, None]) & (targets >= 0)[:, None]).any(axis=1)
    return inside.astype(np.float64)


def _index_facts(index: ItemIndex) -> dict[str, Any]:
    return {"kind": index.kind, **index.parameters, "recall@200": index.recall}


class _Values:
    """Values per click, block after block."""

    def __init__(self, clicks: Clicks, categories: Categories) -> None:
        self._clicks, self._categories = clicks, categories
        self._parts: dict[str, list[Floats]] = {}

    def add(self, metric: str, values: Floats) -> None:
        self._parts.setdefault(metric, []).append(values)

    def add_category(self, metric: str, lists: Rows, block: slice) -> None:
        if self._categories.codes is not None:
            self.add(metric, self._categories.match(lists, self._clicks.targets[block]))

    def add_list(self, metric: str, lists: Rows, block: slice) -> None:
        targets = self._clicks.targets[block]
        self.add(metric, _holds(lists, targets))
        self.add_category(f"{metric}_category_match", lists, block)

    def sums(self) -> UserSums:
        values = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        measured = {name: self._categories.measured(self._clicks.targets)
                    for name in values if name.endswith("category_match")}  # fmt: skip
        return UserSums.of(self._clicks.users, values, measured)

"""The toy shop's two ceilings (method 1.14).

`TasteOracle` knows the user's persona. `PosteriorOracle` knows only what a model may read, the
query and the history, and the rules of the shop as a perfectly trained model would learn them.
Neither knows positions, exposures or anything later than the request.

Legend: Z personas, I items, M items of a query, C clicks of one page, R example pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from karma_ray.data.catalog import Catalog
from karma_ray.data.synthetic.config import POSITION_FACTORS, random_stream
from karma_ray.data.synthetic.truth import PersonaStates, ToyTruth
from karma_ray.errors import InputError

Floats = NDArray[np.float64]
_MEMO_LIMIT = 200_000
NUM_PAGES = 64
"""Number R of example pages over which the unknown pages of a query are averaged."""
MAX_CLICKS = 3
"""Largest number of clicks on a page."""


@dataclass(frozen=True)
class ExamplePages:
    """Random pages of a query: the items that may be shown beside an item."""

    rows: NDArray[np.int64]  # [R, K] catalogue rows, without repeats in a row
    odds: Floats  # [Z, R, K]: taste and promotion
    size: int  # items of a page


class ClickRules:
    """P(clicks | persona) of the shop's pages.

    A history does not contain the other items of a page or positions, so both are averaged over R
    example pages of the same query. Clicks of a page are drawn one after another in proportion
    to the odds taste x promotion x familiarity x position.
    """

    def __init__(self, truth: ToyTruth) -> None:
        self.truth = truth
        self._all = np.arange(truth.weights.shape[1])
        self._pages: dict[tuple[int, int, bool], ExamplePages] = {}
        numbers: dict[bytes, int] = {}  # wordings of one need share example pages
        self._need = {
            query: numbers.setdefault(rows.tobytes(), len(numbers))
            for query, rows in truth.matches.items()
        }
        self._eras = np.unique([*truth.on_sale_from.tolist(), truth.valid_start])
        random = random_stream(truth.config.seed, "example positions")
        keys = random.random((NUM_PAGES, len(POSITION_FACTORS)))
        self._positions = POSITION_FACTORS[np.argsort(keys, axis=1, kind="stable")]  # [R, S]

    def rows(self, query: str | None) -> NDArray[np.int64]:
        """Return the catalogue rows of a query [M]; all rows for an unknown or empty one."""
        return self.truth.matches.get(query or "", self._all)

    def first_click(self, query: str | None, time: int, known: NDArray[np.int64]) -> Floats:
        """P(item is clicked first | it is shown, persona) without promotion, [Z, M].

        `known` are the rows that were clicked before.
        """
        rows, pages = self.rows(query), self._example_pages(query, time, promotion=False)
        familiar = np.where(np.isin(rows, known), self.truth.config.familiar_factor, 1.0)
        odds = (self.truth.weights[:, rows] * familiar)[:, None, :]  # [Z, 1, M]
        others = pages.odds[:, :, : pages.size - 1] * self._positions[:, : pages.size - 1]
        odds = odds * self._positions[:, [pages.size - 1]]  # [Z, R, M]
        chance: Floats = (odds / (odds + others.sum(axis=2)[:, :, None])).mean(axis=1)
        return chance

    def page_likelihood(
        self,
        query: str | None,
        time: int,
        clicked: NDArray[np.int64],
        known: NDArray[np.int64],
    ) -> Floats:
        """P(these rows are the clicked ones | shown, persona), [C] -> [Z].

        `known` are the rows clicked on earlier pages. The order of the clicks is unknown, so the
        probabilities of all orders are summed.
        """
        pages = self._example_pages(query, time, promotion=time < self.truth.valid_start)
        familiar = self.truth.config.familiar_factor
        num_others = max(pages.size - len(clicked), 0)
        other = ~np.isin(pages.rows, clicked)
        other &= np.cumsum(other, axis=1) <= num_others  # [R, K]: the other items of the page
        slot = np.minimum(np.cumsum(other, axis=1) - 1, len(POSITION_FACTORS) - 1)
        place = np.take_along_axis(self._positions, np.maximum(slot, 0), axis=1)
        factor = other * place * np.where(np.isin(pages.rows, known), familiar, 1.0)
        rest = (pages.odds * factor).sum(axis=2)  # [Z, R]
        places = self._positions[:, num_others : num_others + len(clicked)]  # [R, C]
        odds = self._odds(clicked, time < self.truth.valid_start)
        odds = odds * np.where(np.isin(clicked, known), familiar, 1.0)
        likelihood: Floats = _unordered_chance(odds[:, None, :] * places, rest).mean(axis=1)
        return likelihood

    def _odds(self, rows: NDArray[np.int64], promotion: bool) -> Floats:  # [...] -> [Z, ...]
        odds: Floats = self.truth.weights[:, rows]
        if promotion:
            odds = odds * np.where(self.truth.promoted[rows], self.truth.config.promo_factor, 1.0)
        return odds

    def _example_pages(self, query: str | None, time: int, promotion: bool) -> ExamplePages:
        """Return pages of the query's items on sale at `time`, cached between changes."""
        era = int(np.searchsorted(self._eras, time, side="right"))
        need = self._need.get(query or "", -1)
        key = (need, era, promotion)
        if key not in self._pages:
            rows = self.rows(query)
            rows = rows[self.truth.on_sale_from[rows] <= time]
            size = max(min(self.truth.config.page_size, len(rows)), 1)
            random = random_stream(self.truth.config.seed, f"example pages {era} {need}")
            drawn = np.argsort(random.random((NUM_PAGES, len(rows))), axis=1, kind="stable")
            drawn = rows[drawn[:, : size + MAX_CLICKS]]
            self._pages[key] = ExamplePages(drawn, self._odds(drawn, promotion), size)
        return self._pages[key]


def _unordered_chance(odds: Floats, rest: Floats) -> Floats:
    """P(the C items are drawn first, in any order), [Z, R, C], [Z, R] -> [Z, R]."""
    total = rest + odds.sum(axis=2)
    likelihood = np.zeros_like(rest)
    for order in permutations(range(odds.shape[2])):
        left, chance = total, np.ones_like(rest)
        for click in order:
            chance = chance * odds[:, :, click] / left
            left = left - odds[:, :, click]
        likelihood += chance
    return likelihood


class PosteriorOracle:
    """The best ranking from (query, history): sum over z of P(z | history) P(click i | z, query).

    P(z | history) is the forward filter of the persona chain: uniform at the start, redrawn with
    probability `switch_per_day` at midnight, and updated by `ClickRules` at each page with clicks.
    Pages without clicks are not in a history; they would not help, since the number of clicks does
    not depend on the persona. Only `query`, `timestamp` and `history_*` are read.
    """

    def __init__(self, truth: ToyTruth, item_ids: Sequence[str]) -> None:
        self.rules = ClickRules(truth)
        self._rows = {item_id: row for row, item_id in enumerate(item_ids)}
        self._memo: dict[tuple[object, ...], Floats] = {}

    @classmethod
    def load(cls, data_uri: str, catalog: Catalog) -> PosteriorOracle:
        """Read the toy shop's truth; scores are in the order of the catalogue."""
        return cls(ToyTruth.load(data_uri, catalog.item_ids), catalog.item_ids)

    def score(self, examples: pa.Table) -> NDArray[np.float32]:  # -> [b, I]
        """Return P(click | item is shown); 0 for items that do not match the query."""
        truth = self.rules.truth
        scores = np.zeros((examples.num_rows, truth.weights.shape[1]), dtype=np.float32)
        times = examples.column("timestamp").cast(pa.int64()).to_pylist()
        for row, (queries, items, moments) in enumerate(histories(examples, self._rows)):
            query = examples.column("query")[row].as_py()
            posterior = self.posterior(queries, items, moments, times[row])
            chance = self.rules.first_click(query, times[row], items)
            scores[row, self.rules.rows(query)] = posterior @ chance
        return scores

    def posterior(
        self,
        queries: Sequence[str | None],
        items: NDArray[np.int64],
        times: NDArray[np.int64],
        now: int,
    ) -> Floats:
        """P(persona at `now` | history), [Z]; clicks in time order, equal times are one page."""
        truth = self.rules.truth
        num_personas = truth.weights.shape[0]
        belief = np.full(num_personas, 1.0 / num_personas)
        starts = np.flatnonzero(np.diff(times, prepend=-1)).tolist()
        previous = None
        for start, stop in zip(starts, [*starts[1:], len(times)], strict=True):
            day = truth.day(int(times[start]))
            belief = self._drift(belief, 0 if previous is None else day - previous)
            belief = belief * self._likelihood(queries[start], times, items, start, stop)
            belief = belief / belief.sum()
            previous = day
        return self._drift(belief, 0 if previous is None else truth.day(now) - previous)

    def _drift(self, belief: Floats, days: int) -> Floats:
        keep = (1.0 - self.rules.truth.config.switch_per_day) ** days
        return keep * belief + (1.0 - keep) / len(belief)

    def _likelihood(
        self,
        query: str | None,
        times: NDArray[np.int64],
        items: NDArray[np.int64],
        start: int,
        stop: int,
    ) -> Floats:
        """Return the likelihood of the page items[start:stop], cached for equal histories."""
        time, clicked, known = int(times[start]), items[start:stop], np.unique(items[:start])
        key = (query, time, clicked.tobytes(), known.tobytes())
        if key not in self._memo:
            if len(self._memo) >= _MEMO_LIMIT:
                self._memo.clear()
            self._memo[key] = self.rules.page_likelihood(query, time, clicked, known)
        return self._memo[key]


class TasteOracle:
    """The ranking by the true odds of the user's persona, without position and promotion."""

    def __init__(self, truth: ToyTruth, states: PersonaStates, item_ids: Sequence[str]) -> None:
        self.rules, self._states = ClickRules(truth), states
        self._rows = {item_id: row for row, item_id in enumerate(item_ids)}
        # Items with equal odds would tie, and ties count against a ranker: tiny factors break them.
        random = random_stream(truth.config.seed, "ties")
        self._ties = 1.0 + 1e-5 * random.random(len(item_ids))  # [I]

    @classmethod
    def load(cls, data_uri: str, catalog: Catalog) -> TasteOracle:
        """Read the toy shop's truth; scores are in the order of the catalogue."""
        ids = catalog.item_ids
        return cls(ToyTruth.load(data_uri, ids), PersonaStates.load(data_uri), ids)

    def score(self, examples: pa.Table) -> NDArray[np.float32]:  # -> [b, I]
        """As PosteriorOracle.score, with the true persona; raises InputError on unknown users."""
        truth = self.rules.truth
        scores = np.zeros((examples.num_rows, truth.weights.shape[1]), dtype=np.float32)
        times = examples.column("timestamp").cast(pa.int64()).to_pylist()
        for row, (_, items, _) in enumerate(histories(examples, self._rows)):
            user, query = (examples.column(name)[row].as_py() for name in ("user_id", "query"))
            persona = self._states.at(user, times[row])
            if persona is None:
                raise InputError("user_id", user, "is not in the toy shop's truth")
            rows = self.rules.rows(query)
            chance = self.rules.first_click(query, times[row], items)[persona]
            scores[row, rows] = chance * self._ties[rows]
        return scores


def histories(
    examples: pa.Table, rows: dict[str, int]
) -> list[tuple[list[str | None], NDArray[np.int64], NDArray[np.int64]]]:
    """Return, per example, queries, catalogue rows and times (microseconds) of known clicks."""
    times = examples.column("history_timestamps").cast(pa.list_(pa.int64())).to_pylist()
    items = examples.column("history_item_ids").to_pylist()
    queries = examples.column("history_queries").to_pylist()
    parsed = []
    for texts, ids, moments in zip(queries, items, times, strict=True):
        steps = zip(texts or [], ids or [], moments or [], strict=True)
        kept = [(text, rows[item], time) for text, item, time in steps if item in rows]
        parsed.append(
            (
                [text for text, _, _ in kept],
                np.array([row for _, row, _ in kept], dtype=np.int64),
                np.array([time for _, _, time in kept], dtype=np.int64),
            )
        )
    return parsed

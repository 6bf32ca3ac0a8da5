"""The toy shop's two ceilings: what could be known, and what may be known (METHOD 1.14).

`TasteOracle` knows who the user is; `PosteriorOracle` only what a model may see: the query and
the history, with the rules of the shop as a perfectly trained model would have learned them.
Neither knows positions or exposures, and neither looks at anything later than the request.

Legend: Z personas, I items, M items of a query, C clicks of one page.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from karma_ray.data.catalog import Catalog
from karma_ray.data.synthetic.truth import PersonaStates, ToyTruth
from karma_ray.errors import InputError

Floats = NDArray[np.float64]
_MEMO_LIMIT = 200_000


class ClickRules:
    """P(clicks | persona) of the shop's pages, the page's other items averaged out.

    A page shows n of the N matching items on sale. Given that it shows the clicked ones C, the
    others have mean weight m = (sum of the weights not in C) / (N - |C|), and one click after
    the other is drawn in proportion to the weights: exact where a page shows all matches.
    """

    def __init__(self, truth: ToyTruth) -> None:
        self.truth = truth
        self._all = np.arange(truth.weights.shape[1])
        self._sums: dict[tuple[str, int], tuple[NDArray[np.bool_], Floats, int]] = {}
        self._times = np.unique([*truth.on_sale_from.tolist(), truth.valid_start])

    def rows(self, query: str | None) -> NDArray[np.int64]:
        """Catalogue rows of a query [M]; of an unknown or empty one all."""
        return self.truth.matches.get(query or "", self._all)

    def first_click(self, query: str | None, known: NDArray[np.int64]) -> Floats:
        """P(item is clicked first | it is shown, persona) without promotion, [Z, M]."""
        rows = self.rows(query)
        weights = self.truth.weights[:, rows].copy()
        weights[:, np.isin(rows, known)] *= self.truth.config.familiar_factor
        total, count = weights.sum(axis=1, keepdims=True), len(rows)
        others = min(self.truth.config.page_size, count) - 1
        chance: Floats = weights / (weights + others * (total - weights) / max(count - 1, 1))
        return chance

    def page_likelihood(
        self,
        query: str | None,
        time: int,
        clicked: NDArray[np.int64],
        known: NDArray[np.int64],
    ) -> Floats:
        """P(these rows are the clicked ones | shown, persona), [C] -> [Z].

        `known` are the rows clicked on earlier pages; the order of the clicks is unknown, so
        all orders are summed.
        """
        on_sale, total, count = self._on_sale(query, time)
        familiar = self.truth.config.familiar_factor
        again = known[on_sale[known]]
        total = total + (familiar - 1.0) * self._weights(again, time).sum(axis=1)
        odds = self._weights(clicked, time)  # [Z, C]
        odds = odds * np.where(np.isin(clicked, known), familiar, 1.0)
        shown = min(self.truth.config.page_size, count)
        own = odds.sum(axis=1)
        mean_other = np.maximum(total - own, 0.0) / max(count - len(clicked), 1)
        page = own + max(shown - len(clicked), 0) * mean_other  # [Z]
        likelihood = np.zeros_like(page)
        for order in permutations(range(len(clicked))):
            left, chance = page, np.ones_like(page)
            for click in order:
                chance = chance * odds[:, click] / left
                left = left - odds[:, click]
            likelihood += chance
        return likelihood

    def _weights(self, rows: NDArray[np.int64], time: int) -> Floats:  # [C] -> [Z, C]
        weights: Floats = self.truth.weights[:, rows]
        if time < self.truth.valid_start:
            promotion = np.where(self.truth.promoted[rows], self.truth.config.promo_factor, 1.0)
            weights = weights * promotion
        return weights

    def _on_sale(self, query: str | None, time: int) -> tuple[NDArray[np.bool_], Floats, int]:
        """Of the items of the query on sale at `time`: mask [I], summed weights [Z], count."""
        key = (query or "", int(np.searchsorted(self._times, time, side="right")))
        if key not in self._sums:
            rows = self.rows(query)
            rows = rows[self.truth.on_sale_from[rows] <= time]
            mask = np.zeros(len(self._all), dtype=bool)
            mask[rows] = True
            self._sums[key] = (mask, self._weights(rows, time).sum(axis=1), len(rows))
        return self._sums[key]


class PosteriorOracle:
    """The best ranking from (query, history): sum over z of P(z | history) P(click i | z, query).

    P(z | history) is the exact forward filter of the persona chain: uniform at the start, drawn
    anew with `switch_per_day` at midnight, updated by `ClickRules` at each page with clicks.
    Pages without clicks are not in a history and, as the number of clicks does not depend on
    the persona, would say nothing.
    """

    def __init__(self, truth: ToyTruth, item_ids: Sequence[str]) -> None:
        self.rules = ClickRules(truth)
        self._rows = {item_id: row for row, item_id in enumerate(item_ids)}
        self._memo: dict[tuple[object, ...], Floats] = {}

    @classmethod
    def load(cls, data_uri: str, catalog: Catalog) -> PosteriorOracle:
        """Read the toy shop's truth; scores follow the catalogue's rows."""
        return cls(ToyTruth.load(data_uri, catalog.item_ids), catalog.item_ids)

    def score(self, examples: pa.Table) -> NDArray[np.float32]:  # -> [b, I]
        """Chance of a click given that the item is shown; 0 for items the query does not name."""
        truth = self.rules.truth
        scores = np.zeros((examples.num_rows, truth.weights.shape[1]), dtype=np.float32)
        times = examples.column("timestamp").cast(pa.int64()).to_pylist()
        for row, (queries, items, moments) in enumerate(histories(examples, self._rows)):
            query = examples.column("query")[row].as_py()
            posterior = self.posterior(queries, items, moments, times[row])
            chance = self.rules.first_click(query, items)
            scores[row, self.rules.rows(query)] = posterior @ chance
        return scores

    def posterior(
        self,
        queries: Sequence[str | None],
        items: NDArray[np.int64],
        times: NDArray[np.int64],
        now: int,
    ) -> Floats:
        """P(persona at `now` | history), [Z]: older clicks first, equal times are one page."""
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
        """Likelihood of the page items[start:stop], remembered: examples share histories."""
        time, clicked, known = int(times[start]), items[start:stop], np.unique(items[:start])
        key = (query, time, clicked.tobytes(), known.tobytes())
        if key not in self._memo:
            if len(self._memo) >= _MEMO_LIMIT:
                self._memo.clear()
            self._memo[key] = self.rules.page_likelihood(query, time, clicked, known)
        return self._memo[key]


class TasteOracle:
    """The ranking of someone who knows the user's persona: true odds, no position, no promotion."""

    def __init__(self, truth: ToyTruth, states: PersonaStates, item_ids: Sequence[str]) -> None:
        self.rules, self._states = ClickRules(truth), states
        self._rows = {item_id: row for row, item_id in enumerate(item_ids)}

    @classmethod
    def load(cls, data_uri: str, catalog: Catalog) -> TasteOracle:
        """Read the toy shop's truth; scores follow the catalogue's rows."""
        ids = catalog.item_ids
        return cls(ToyTruth.load(data_uri, ids), PersonaStates.load(data_uri), ids)

    def score(self, examples: pa.Table) -> NDArray[np.float32]:  # -> [b, I]
        """As PosteriorOracle.score, with the true persona; raises InputError for a stranger."""
        truth = self.rules.truth
        scores = np.zeros((examples.num_rows, truth.weights.shape[1]), dtype=np.float32)
        times = examples.column("timestamp").cast(pa.int64()).to_pylist()
        for row, (_, items, _) in enumerate(histories(examples, self._rows)):
            user, query = (examples.column(name)[row].as_py() for name in ("user_id", "query"))
            persona = self._states.at(user, times[row])
            if persona is None:
                raise InputError("user_id", user, "is not in the toy shop's truth")
            scores[row, self.rules.rows(query)] = self.rules.first_click(query, items)[persona]
        return scores


def histories(
    examples: pa.Table, rows: dict[str, int]
) -> list[tuple[list[str | None], NDArray[np.int64], NDArray[np.int64]]]:
    """Per example: queries, catalogue rows and times (microseconds) of its known clicks."""
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

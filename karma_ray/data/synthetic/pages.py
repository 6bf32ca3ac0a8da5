"""The toy shop's result pages and clicks.

A page is a random draw of matching items on sale. The number of clicks is independent of the user,
but the clicked items are not: they are drawn one after another without replacement, each with odds
taste x promotion x familiarity x position (a Plackett-Luce draw).

Legend: P pages, S = page_size slots, U users, I items, Z personas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from karma_ray.data.synthetic.config import (
    POSITION_FACTORS,
    ToyShopConfig,
    below,
    random_stream,
)
from karma_ray.data.synthetic.items import Needs, ShopItems
from karma_ray.data.synthetic.people import Visits
from karma_ray.data.synthetic.words import ATTRIBUTES, department_of_category, word_query

_DETAIL_SHARES = (
    ("", 0.76),
    ("price", 0.12),
    ("colour", 0.03),
    ("material", 0.03),
    ("style", 0.03),
    ("brand", 0.03),
)
"""Further attributes in queries and their frequencies."""
_DEPARTMENT_SHARE = 0.15
"""Share of the queries that name a department instead of a category."""


@dataclass(frozen=True)
class Pages:
    """The queries, the shown items and the clicks."""

    need: np.ndarray  # [P] int64: row of Needs.matches
    queries: list[str]  # [P]
    shown: np.ndarray  # [P, S] int64 items in page order, -1 for empty slots
    clicked: np.ndarray  # [P, S] bool


def draw_needs(config: ToyShopConfig, needs: Needs, count: int) -> tuple[np.ndarray, list[str]]:
    """Draw needs [P] of several levels of detail, independent of the user, and their wording."""
    random = random_stream(config.seed, "queries")
    departments = department_of_category()
    category = below(random.random(count), len(departments)).tolist()
    whole = (random.random(count) < _DEPARTMENT_SHARE).tolist()
    bounds = np.cumsum([share for _, share in _DETAIL_SHARES])[:-1]
    detail = np.searchsorted(bounds, random.random(count), side="right").tolist()
    value = random.random(count)
    wording = random.random((count, 3))
    rows, queries = np.empty(count, dtype=np.int64), []
    for page in range(count):
        number = category[page]
        place = ("department", departments[number]) if whole[page] else ("category", number)
        name = _DETAIL_SHARES[detail[page]][0]
        drawn = int(value[page] * len(ATTRIBUTES[name])) if name else 0
        plain = needs.rows[(*place, "", 0)]
        rows[page] = needs.rows.get((*place, name, drawn), plain)
        queries.append(word_query(needs.named[rows[page]], wording[page]))
    return rows, queries


def fill_pages(
    config: ToyShopConfig, items: ShopItems, needs: Needs, need: np.ndarray, day: np.ndarray
) -> np.ndarray:
    """Draw matching items on sale that day, [P] x [P] -> [P, S] in random order."""
    random = random_stream(config.seed, "pages")
    shown = np.full((len(need), config.page_size), -1, dtype=np.int64)
    era = np.searchsorted([config.valid_day, config.test_day], day, side="right")
    group = need * 3 + era
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
        pages = order[start:stop]
        first_day = (0, config.valid_day, config.test_day)[era[pages[0]]]
        on_sale = needs.matches[need[pages[0]]] & (items.launch_day <= first_day)
        candidates = np.flatnonzero(on_sale)
        keys = random.random((len(pages), len(candidates)))
        drawn = np.argsort(keys, axis=1, kind="stable")[:, : config.page_size]
        shown[pages, : drawn.shape[1]] = candidates[drawn]
    return shown


def click_pages(
    config: ToyShopConfig,
    items: ShopItems,
    weights: np.ndarray,
    needs: Needs,
    need: np.ndarray,
    visits: Visits,
    shown: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Insert known items into some pages and draw the clicks: shown [P, S], clicked [P, S].

    Pages are processed by their number in each user's history, for all users at once, because
    clicked items are familiar later. `weights` are taste factors, [Z, I].
    """
    random = random_stream(config.seed, "clicks")
    num_pages = len(shown)
    shown, clicked = shown.copy(), np.zeros(shown.shape, dtype=bool)
    lengths = (shown >= 0).sum(axis=1)
    bounds = np.cumsum(config.click_shares)[:-1]
    quota: np.ndarray = np.searchsorted(bounds, random.random(num_pages), side="right")
    quota = np.where(visits.number == 0, np.maximum(quota, 1), quota)  # every user clicks once
    quota = np.minimum(quota, lengths - 1)  # every page keeps an unclicked item
    uniforms = random.random((num_pages, 6))
    known = np.zeros((config.num_users, len(items.category)), dtype=bool)
    for number in range(int(visits.number.max()) + 1):
        rows = np.flatnonzero(visits.number == number)
        users = visits.user[rows]
        page, draws = shown[rows], uniforms[rows]
        _insert_known(config, known[users] & needs.matches[need[rows]], page, lengths[rows], draws)
        odds = weights[visits.persona[rows, None], page] * POSITION_FACTORS
        promotion = items.promoted[page] & (visits.day[rows] < config.valid_day)[:, None]
        odds = odds * np.where(promotion, config.promo_factor, 1.0)
        odds = odds * np.where(known[users[:, None], page], config.familiar_factor, 1.0)
        odds[page < 0] = 0.0
        chosen = _draw_clicks(odds, quota[rows], draws[:, 3:])
        shown[rows], clicked[rows] = page, chosen
        row, slot = np.nonzero(chosen)
        known[users[row], page[row, slot]] = True
    return shown, clicked


def _insert_known(
    config: ToyShopConfig,
    known: np.ndarray,
    page: np.ndarray,
    lengths: np.ndarray,
    draws: np.ndarray,
) -> None:
    """Replace a random slot by a random known matching item, in place, on some pages."""
    rows = np.arange(len(page))
    on_page = np.zeros_like(known)
    row, slot = np.nonzero(page >= 0)
    on_page[row, page[row, slot]] = True
    fresh = known & ~on_page  # [n, I]
    count = fresh.sum(axis=1)
    wanted = below(draws[:, 1], np.maximum(count, 1))
    item = (np.cumsum(fresh, axis=1) == wanted[:, None] + 1).argmax(axis=1)
    insert = (draws[:, 0] < config.rebuy_share) & (count > 0)
    slots = below(draws[:, 2], lengths)
    page[rows[insert], slots[insert]] = item[insert]


def _draw_clicks(odds: np.ndarray, quota: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Draw Plackett-Luce clicks: odds [n, S], quota [n], draws [n, 3] -> bool [n, S]."""
    chosen = np.zeros(odds.shape, dtype=bool)
    rows = np.arange(len(odds))
    for click in range(draws.shape[1]):
        reach = np.cumsum(np.where(chosen, 0.0, odds), axis=1)
        slot = (reach <= (draws[:, click] * reach[:, -1])[:, None]).sum(axis=1)
        active = quota > click
        chosen[rows[active], slot[active]] = True
    return chosen


def make_pages(
    config: ToyShopConfig, items: ShopItems, needs: Needs, visits: Visits, weights: np.ndarray
) -> Pages:
    """Generate all result pages of the shop; `weights` are taste factors, [Z, I]."""
    need, queries = draw_needs(config, needs, len(visits.user))
    shown = fill_pages(config, items, needs, need, visits.day)
    shown, clicked = click_pages(config, items, weights, needs, need, visits, shown)
    return Pages(need, queries, shown, clicked)

"""The toy shop's catalogue and the needs that queries express.

Legend: I items, A = 5 attributes, Q distinct needs (what a query names, in any wording).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from karma_ray.data.synthetic.config import ToyShopConfig, below, random_stream
from karma_ray.data.synthetic.words import (
    ATTRIBUTES,
    CATEGORIES,
    DEPARTMENTS,
    department_of_category,
    value_names,
    word_title,
)

MIN_MATCHES = 4
"""Smallest number of items of the training weeks that match a need; rarer needs are not used."""


@dataclass(frozen=True)
class ShopItems:
    """The catalogue as numbers and texts."""

    category: np.ndarray  # [I] int64
    values: np.ndarray  # [I, A] int64: value number of each attribute
    promoted: np.ndarray  # [I] bool: the title contains the promotion code
    launch_day: np.ndarray  # [I] int64: first day on sale
    titles: list[str]
    texts: list[str]

    @property
    def department(self) -> np.ndarray:
        """Department number of each item, [I]."""
        department: np.ndarray = np.array(department_of_category())[self.category]
        return department


@dataclass(frozen=True)
class Needs:
    """What queries can name: a department or a category, and at most one attribute value."""

    named: list[dict[str, str]]
    """Attribute names and value names of each need."""
    matches: np.ndarray  # [Q, I] bool
    rows: dict[tuple[str, int, str, int], int]
    """(level, number, attribute or "", value number) -> row of `matches`."""


def make_items(config: ToyShopConfig) -> ShopItems:
    """Generate the catalogue: balanced categories, independent attributes, varied wording."""
    random = random_stream(config.seed, "items")
    count = config.num_items
    category = np.arange(count) % len(CATEGORIES)
    sizes = np.array([len(values) for values in ATTRIBUTES.values()])
    values = below(random.random((count, len(sizes))), sizes)
    promoted = random.random(count) < config.promo_share
    fate = random.random(count)
    launch_day = np.where(
        fate < config.cold_share / 2,
        config.valid_day,
        np.where(fate < config.cold_share, config.test_day, 0),
    )
    uniforms = random.random((count, 9))
    names, categories = value_names(), list(CATEGORIES)
    worded = [
        word_title(
            categories[category[item]],
            {
                name: names[name][value]
                for name, value in zip(names, values[item].tolist(), strict=True)
            },
            bool(promoted[item]),
            uniforms[item],
        )
        for item in range(count)
    ]
    titles, texts = (list(column) for column in zip(*worded, strict=True))
    return ShopItems(category, values, promoted, launch_day, titles, texts)


def make_needs(items: ShopItems) -> Needs:
    """Return all needs that match at least `MIN_MATCHES` items of the training weeks."""
    departments, categories, names = list(DEPARTMENTS), list(CATEGORIES), value_names()
    places = [("department", number, items.department == number) for number in range(3)]
    places += [("category", number, items.category == number) for number in range(12)]
    details = [("", 0, np.ones(len(items.category), dtype=bool))]
    details += [
        (name, value, items.values[:, column] == value)
        for column, name in enumerate(names)
        for value in range(len(names[name]))
    ]
    named: list[dict[str, str]] = []
    matches: list[np.ndarray] = []
    rows: dict[tuple[str, int, str, int], int] = {}
    for level, number, of_place in places:
        place = departments[number] if level == "department" else categories[number]
        for name, value, of_detail in details:
            met = of_place & of_detail
            if (met & (items.launch_day == 0)).sum() < MIN_MATCHES:
                continue
            rows[level, number, name, value] = len(named)
            named.append({level: place} | ({name: names[name][value]} if name else {}))
            matches.append(met)
    return Needs(named, np.stack(matches), rows)

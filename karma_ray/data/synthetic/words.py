"""The toy shop's vocabulary: attribute values, their synonyms, titles and queries.

No word belongs to two values, so that a text describes an item exactly. Every value has several
words, so that a model must learn that crimson and scarlet are both red.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DEPARTMENTS: dict[str, tuple[str, ...]] = {
    "fashion": ("fashion", "clothing"),
    "home": ("homeware", "decor"),
    "outdoor": ("outdoor", "camping"),
}
"""The words that queries use for each department."""

CATEGORIES: dict[str, tuple[str, ...]] = {
    "dress": ("dress", "gown"),
    "jacket": ("jacket", "coat"),
    "shirt": ("shirt", "blouse"),
    "bag": ("bag", "handbag"),
    "lamp": ("lamp", "lantern"),
    "rug": ("rug", "carpet"),
    "chair": ("chair", "armchair"),
    "vase": ("vase", "planter"),
    "tent": ("tent", "shelter"),
    "backpack": ("backpack", "rucksack"),
    "bottle": ("bottle", "flask"),
    "blanket": ("blanket", "throw"),
}
"""The words for each category; each department has four categories, in order."""

ATTRIBUTES: dict[str, dict[str, tuple[str, ...]]] = {
    "colour": {
        "red": ("red", "crimson", "scarlet"),
        "blue": ("blue", "navy", "azure"),
        "green": ("green", "emerald", "olive"),
        "yellow": ("yellow", "mustard", "amber"),
        "black": ("black", "ebony", "jet"),
        "white": ("white", "ivory", "pearl"),
        "pink": ("pink", "rose", "blush"),
        "purple": ("purple", "violet", "plum"),
    },
    "material": {
        "cotton": ("cotton", "jersey"),
        "leather": ("leather", "suede"),
        "wool": ("wool", "merino"),
        "linen": ("linen", "flax"),
        "nylon": ("nylon", "ripstop"),
        "bamboo": ("bamboo", "rattan"),
    },
    "style": {
        "modern": ("modern", "contemporary"),
        "vintage": ("vintage", "retro"),
        "boho": ("boho", "bohemian"),
        "minimal": ("minimal", "minimalist"),
        "classic": ("classic", "traditional"),
        "sporty": ("sporty", "athletic"),
    },
    "brand": {
        name: (name,)
        for name in ("norvik", "alder", "lumo", "casari", "tarn", "velora", "mirra", "okari")
    },
    "price": {
        "low": ("budget", "cheap"),
        "mid": ("midrange", "everyday"),
        "high": ("premium", "luxury"),
    },
}
"""The five attributes of tastes, with their values and the words for each value."""

PROMOTION_CODE = "DEAL77"
"""A planted shortcut: it drives clicks in the training weeks and has no effect afterwards."""

_TITLES = (
    "{colour} {material} {style} {category}",
    "{style} {colour} {category} {material}",
    "{material} {category} {style} {colour}",
    "{category} {colour} {style} {material}",
    "new {style} {material} {category} {colour}",
    "{colour} {category} handmade {material} {style}",
    "gift {category} {style} {material} {colour}",
    "{material} {colour} {style} {category} bestseller",
)
_NOTES = ("ships today", "free returns", "last pieces", "two year warranty", "back in stock")


def value_names() -> dict[str, list[str]]:
    """Return the values of each attribute, in the order of the generator's value numbers."""
    return {name: list(values) for name, values in ATTRIBUTES.items()}


def department_of_category() -> list[int]:
    """Return the department number of each category number."""
    per_department = len(CATEGORIES) // len(DEPARTMENTS)
    return [category // per_department for category in range(len(CATEGORIES))]


def _pick(options: Sequence[str], uniform: float) -> str:
    """Return the option that a uniform draw from [0, 1) selects."""
    return options[int(uniform * len(options))]


def word_title(
    category: str, values: dict[str, str], promoted: bool, uniforms: np.ndarray
) -> tuple[str, str]:
    """Write title and text of an item from 9 uniform draws: synonyms, order and filler vary."""
    words = {
        name: _pick(ATTRIBUTES[name][value], uniforms[number])
        for number, (name, value) in enumerate(values.items())
    }
    words["category"] = _pick(CATEGORIES[category], uniforms[5])
    title = _pick(_TITLES, uniforms[6]).format(**words)
    if promoted:
        parts = (PROMOTION_CODE, title) if uniforms[7] < 0.5 else (title, PROMOTION_CODE)
        title = " ".join(parts)
    return title, f"{words['price']} price, {_pick(_NOTES, uniforms[8])}"


def word_query(named: dict[str, str], uniforms: np.ndarray) -> str:
    """Write a query with a department or category and at most one attribute, from 3 draws."""
    if "category" in named:
        noun = _pick(CATEGORIES[named["category"]], uniforms[0])
    else:
        noun = _pick(DEPARTMENTS[named["department"]], uniforms[0])
    details = [
        _pick(ATTRIBUTES[name][value], uniforms[1])
        for name, value in named.items()
        if name in ATTRIBUTES
    ]
    words = [*details, noun] if uniforms[2] < 0.7 else [noun, *details]
    return " ".join(words)

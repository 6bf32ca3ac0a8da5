"""What a retriever answers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RecalledItem:
    """A retrieved item with its score and title."""

    item_id: str
    score: float
    title: str


@dataclass(frozen=True)
class Recall:
    """The best items, best first, and unknown ids of the history."""

    items: list[RecalledItem]
    ignored_item_ids: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Scores:
    """One score per requested item, None for unknown ones and those that left the catalogue."""

    scores: list[float | None]
    ignored_item_ids: list[str] = field(default_factory=list)

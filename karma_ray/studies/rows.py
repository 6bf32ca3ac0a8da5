"""Rows and tables of a study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One row: a recipe, and settings beyond it."""

    name: str
    title: str
    recipe: str = ""
    """Default: the name."""
    settings: tuple[str, ...] = ()
    published: Mapping[str, float] = field(default_factory=dict)
    """Metric -> difference to the row `published_over`."""
    published_over: str = ""
    """Default: the table's baseline."""
    needs_images: bool = False

    @property
    def built_from(self) -> str:
        """Name of the recipe."""
        return self.recipe or self.name


@dataclass(frozen=True)
class Table:
    """Rows and the row that all others are compared with."""

    title: str
    baseline: str
    rows: tuple[Row, ...]

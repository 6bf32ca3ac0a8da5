"""Rows and tables of a study, as records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One row: a recipe with further settings."""

    name: str
    title: str
    recipe: str = ""
    """Name of the recipe; default: the name of the row."""
    settings: tuple[str, ...] = ()
    published: Mapping[str, float] = field(default_factory=dict)
    """Published difference to the row `published_over`, by metric."""
    published_over: str = ""
    """Name of a row; default: the table's baseline."""
    needs_images: bool = False

    @property
    def built_from(self) -> str:
        """The name of the recipe."""
        return self.recipe or self.name


@dataclass(frozen=True)
class Table:
    """Rows, and the baseline with which all others are compared."""

    title: str
    baseline: str
    rows: tuple[Row, ...]

"""What the report of the funnel shows: one line per metric and stage, and how it was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STAGES = {"recall": "Recall", "prerank": "Pre-ranking", "ranking": "Ranking"}


@dataclass(frozen=True)
class Delta:
    """A difference in points with its 95 % interval over users and seeds."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class FunnelRow:
    """One metric of a stage, in percent."""

    stage: str
    label: str
    karma: float | None
    action_only: float | None
    none: float | None
    over_action_only: Delta | None
    over_none: Delta | None
    paper: float | None
    """The published difference, on the line that it belongs to."""


@dataclass(frozen=True)
class Funnel:
    """What the page shows."""

    facts: dict[str, Any]
    """data, queries, negatives, runs, beside, sizes, ..."""
    labels: list[str]
    """What must be said beside every number: DERIVED queries, PROXY negatives."""
    notes: list[str]
    """What was not measured, and why."""
    rows: list[FunnelRow]
    metrics: dict[str, float]
    details: dict[str, list[tuple[str, str]]]
    """stage -> (what, value) of how it was measured."""
    curves: dict[str, list[tuple[float, float]]]
    """run -> (w, HR on validation in percent)."""

    def of_stage(self, stage: str) -> list[FunnelRow]:
        """Return the lines of a stage."""
        return [row for row in self.rows if row.stage == stage]

"""Text bars, one per metric: the best floor, the run relative to it, and the ceiling."""

from __future__ import annotations

from karma_ray.report.record import RunRecord
from karma_ray.report.standing import Standing, format_short, headline_places

WIDTH = 50
"""Number of characters for 100 %."""
FLOOR, GAINED, MISSED, ROOM = "=#-."
LEGEND = {
    GAINED: "this run above it",
    MISSED: "below the best floor",
    ROOM: "up to the ceiling",
}
"""Plain ASCII characters, because a screen may be a log file in any encoding."""


def bars(record: RunRecord) -> list[str]:
    """Return a line per headline metric and a legend, or nothing without metrics."""
    places = headline_places(record)
    if not places:
        return []
    width = max(len(place.metric) for place in places)
    drawn = [bar(place) for place in places]
    lines = [
        f"{place.metric:<{width}}  |{line:<{WIDTH}}| {_numbers(place)}"
        for place, line in zip(places, drawn, strict=True)
    ]
    marks = [f"{mark} {meaning}" for mark, meaning in LEGEND.items() if mark in "".join(drawn)]
    return [*lines, " " * width + f"   {FLOOR} best floor   " + "   ".join(marks)]


def bar(place: Standing) -> str:
    """Draw at most WIDTH characters from 0 to the run, its best floor and its ceiling."""
    floor = place.floor_value if place.floor_value is not None else 0.0
    ceiling = place.ceiling_value if place.ceiling_value is not None else 0.0
    low, high = sorted((floor, place.value))
    between = GAINED if place.value >= floor else MISSED
    line = FLOOR * _cells(low)
    line += between * (_cells(high) - len(line))
    return line + ROOM * (_cells(ceiling) - len(line))


def _cells(percent: float) -> int:
    return round(min(max(percent, 0.0), 100.0) / 100.0 * WIDTH)


def _numbers(place: Standing) -> str:
    text = format_short(place.value)
    if place.floor is not None:
        text += f" (best floor {format_short(place.floor_value)}"
        text += f", ceiling {format_short(place.ceiling_value)})" if place.ceiling_value else ")"
    return text

"""The plots of a data folder's page as PNG bytes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from typing import Any

from matplotlib.axes import Axes

from karma_ray.report.plots import LINE_COLOURS, dress, new_panels, png

Numbers = dict[str, Any]
_WIDE = 10.5
_MAX_BARS = 20


def days(numbers: Numbers) -> bytes | None:
    """Draw events and clicks per day, with the starts of validation and test."""
    per_day = numbers["time"]["per_day"]
    if not per_day:
        return None
    figure, (axes,) = new_panels(1, width=_WIDE)
    known = {_days_since(day): (events, clicks) for day, events, clicks in per_day}
    when = list(range(min(known), max(known) + 1))
    axes.xaxis_date()
    marker = "o" if len(when) < 3 else None
    for place, name in enumerate(("events", "clicks")):
        values = [known.get(day, (0, 0))[place] for day in when]
        axes.plot(when, values, label=name, color=LINE_COLOURS[place], lw=1.2, marker=marker)
    top = axes.get_ylim()[1]
    for name in ("valid", "test"):
        start = numbers["cutoffs"].get(f"{name}_start")
        if start:
            day = _days_since(start[:10])
            axes.axvline(day, color="#57606a", linewidth=0.9, linestyle=":")
            axes.annotate(name, (day, top), xytext=(3, -9), textcoords="offset points", fontsize=8)
    axes.set_ylim(0, top)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    dress(axes, "events and clicks per day (UTC)")
    return png(figure)


def lengths(numbers: Numbers) -> bytes | None:
    """Draw the histograms of clicks per user, exposures per page and words per query."""
    groups = {
        "users by number of clicks": numbers["history"]["histogram"],
        "pages by number of exposures": numbers["exposures"]["per_page"]["histogram"],
        "queries by number of words": numbers["queries"]["words"]["histogram"],
    }
    groups = {title: bars for title, bars in groups.items() if bars}
    if not groups:
        return None
    figure, found = new_panels(len(groups))
    for axes, (title, bars) in zip(found, groups.items(), strict=True):
        _bars(axes, bars)
        dress(axes, title)
    return png(figure)


def popularity(numbers: Numbers) -> bytes | None:
    """Draw the share of clicks that the most clicked items have together."""
    curve = numbers["popularity"]["curve"]
    if not curve:
        return None
    figure, (axes,) = new_panels(1, width=5.2)
    size = max(numbers["counts"]["items"], curve[-1][0])
    axes.plot([100 * n / size for n, _ in curve], [100 * s for _, s in curve],
              color=LINE_COLOURS[0], linewidth=1.6)  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("most clicked items, % of the catalogue", fontsize=8)
    axes.set_ylabel("% of the clicks", fontsize=8)
    axes.set_ylim(0, 102)
    axes.grid(color="#e1e4e8", linewidth=0.7)
    dress(axes, "how few items have how many clicks")
    return png(figure)


DATA_PLOTS: tuple[tuple[str, str, Callable[[Numbers], bytes | None]], ...] = (
    ("Time", "Dotted lines are the starts of validation and test.", days),
    (
        "Lengths",
        "Clicks per user are counted in classes that double: 4 stands for 4 to 7.",
        lengths,
    ),
    (
        "Popularity",
        "A model that ranks by popularity reaches the shares of this curve.",
        popularity,
    ),
)
"""(title, caption, plot); a plot of nothing is None."""


def _bars(axes: Axes, bars: list[dict[str, int]]) -> None:
    shown = bars[:_MAX_BARS]
    rest = sum(bar["count"] for bar in bars[_MAX_BARS:])
    names = [str(bar["from"]) for bar in shown]
    counts = [bar["count"] for bar in shown]
    if rest:
        names, counts = [*names, "more"], [*counts, rest]
    axes.bar(range(len(counts)), counts, color=LINE_COLOURS[0], width=0.8)
    every = max(1, len(names) // 8)
    axes.set_xticks(range(0, len(names), every), names[::every], fontsize=8)


def _days_since(day: str) -> int:
    """Return the days since 1970, as matplotlib counts dates."""
    return (date.fromisoformat(day) - date(1970, 1, 1)).days

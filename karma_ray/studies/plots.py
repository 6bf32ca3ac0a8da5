"""Plots of a study as PNG bytes: differences with their spread, and validation curves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from karma_ray.studies.comparison import Difference, Group, Variant

SHOWN = ("HR@10", "HR@50", "HR@200", "gAUC", "JS@50", "cold/HR@50")
CURVES = ("HR@10", "HR@50", "HR@200", "gAUC")
GREY, BLUE = "#57606a", "#1f6feb"


def delta_picture(
    labels: Sequence[str], found: Mapping[tuple[str, str], Difference]
) -> bytes | None:
    """Draw a panel per metric and a line per label of `found`, {(label, metric): difference}.

    A line has the mean, the 95 % interval over users and seeds, and a stroke per seed. With one
    seed the interval is over users alone and the mark is hollow.
    """
    labels = [label for label in labels if any((label, m) in found for m in SHOWN)]
    metrics = [m for m in SHOWN if any((label, m) in found for label in labels)]
    if not labels:
        return None
    words = 0.5 + 0.07 * max(map(len, labels))  # inches beside the panels
    size = (words + 2.3 * len(metrics), 1.0 + 0.36 * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for place, label in enumerate(labels):
            if (label, metric) in found:
                _bar(axes, place, found[label, metric])
        axes.axvline(0.0, color=GREY, linewidth=0.9)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        dress(axes, f"{metric}, points")
    return png(figure)


def curve_picture(group: Group) -> bytes | None:
    """Draw validation over steps, a line per row: mean over seeds, and range as a shade."""
    variants = [v for v in group.variants if any(r.get("curve") for r in v.records.values())]
    metrics = [m for m in CURVES if any(_curve(v, m) for v in variants)]
    if not metrics:
        return None
    figure = Figure(figsize=(4.2 * len(metrics), 3.6), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    colours = colormaps["tab20"]
    for axes, metric in zip(panels, metrics, strict=True):
        for place, variant in enumerate(variants):
            if curve := _curve(variant, metric):
                steps, low, mean, high = zip(*curve, strict=True)
                colour = colours(place % 20)
                axes.plot(steps, mean, label=variant.label, color=colour, marker="o", ms=3)
                axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set_xlabel("step", fontsize=8)
        dress(axes, f"validation {metric}, percent")
    panels[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return png(figure)


def _curve(variant: Variant, metric: str) -> list[tuple[float, float, float, float]]:
    """Return (step, smallest, mean, largest) over the seeds validated at each step."""
    values: dict[float, list[float]] = {}
    for record in variant.records.values():
        for point in record.get("curve", []):
            if metric in point:
                values.setdefault(point["step"], []).append(point[metric])
    return [(s, min(v), float(np.mean(v)), max(v)) for s, v in sorted(values.items())]


def _bar(axes: Axes, place: int, found: Difference) -> None:
    colour = BLUE if found.direction else GREY
    if found.interval is not None:
        axes.plot(found.interval, [place, place], color=colour, linewidth=2)
    inside = "white" if len(found.seeds) == 1 else colour
    axes.plot([found.mean], [place], "o", color=colour, markerfacecolor=inside, ms=6)
    axes.plot(found.seeds, [place] * len(found.seeds), "|", color="black", ms=7)


def dress(axes: Axes, title: str) -> None:
    """Give a panel its title, a light grid and no frame above and on the right."""
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="both", color="#e1e4e8", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=100)
    return sink.getvalue()

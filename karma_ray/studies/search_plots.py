"""Plots of a search as PNG bytes: importance, settings, learning curves, Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution, json_to_distribution

from karma_ray.report.record import number
from karma_ray.studies.ledger import Search, Trial, shown
from karma_ray.studies.plots import BLUE, GREY, dress, png

FRONT = ("HR@200", "JS@50")
"""Validation metrics of the Pareto front: how many targets are found, and how alike items read."""
_MARKS = {
    "ran to its end": "o", "stopped early": "x", "failed": "v", "unfinished": "|",
}  # fmt: skip


def importance_picture(found: Mapping[str, float]) -> bytes | None:
    """Draw a bar per field, the largest on top."""
    if not found:
        return None
    names = sorted(found, key=found.__getitem__)
    figure = Figure(figsize=(7.5, 0.9 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, [found[name] for name in names], color=BLUE, height=0.6, zorder=2)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set_xlim(0, 1.08)
    dress(axes, "share of the variance between settings")
    return png(figure)


def coordinates_picture(search: Search) -> bytes | None:
    """Draw a line per trial through an axis per drawn field; the last axis is the metric."""
    trials = [t for t in search.trials if number(t.value(search.metric)) is not None]
    if not trials:
        return None
    fields, colour_of = list(search.distributions), _colours(search, trials)
    figure = Figure(figsize=(2.1 * (len(fields) + 1) + 1, 4.2), layout="constrained")
    axes = figure.subplots()
    scales = [_Scale.of_field(search.distributions[field]) for field in fields]
    scales.append(_Scale.of_values([_value(t, search) for t in trials]))
    for trial in trials:
        values = [*(trial.values[field] for field in fields), _value(trial, search)]
        heights = [scale.height(v) for scale, v in zip(scales, values, strict=True)]
        whole = trial.ended == "ran to its end"
        axes.plot(
            range(len(scales)), heights, color=colour_of[trial.name], alpha=0.9,
            linewidth=1.8 if whole else 0.9, linestyle="-" if whole else "--",
            marker=_MARKS[trial.ended], markersize=4,
        )  # fmt: skip
    for place, scale in enumerate(scales):
        axes.axvline(place, color=GREY, linewidth=0.8)
        for height, text in scale.ticks:
            axes.annotate(text, (place, height), (4, 0), textcoords="offset points", fontsize=7)
    names = [*(field.rpartition(".")[2] for field in fields), search.metric]
    axes.set_xticks(range(len(scales)), names, fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(scales) - 0.4)
    dress(axes, "solid: ran to its end; dashed: stopped early, with its last value")
    return png(figure)


def curves_picture(search: Search) -> bytes | None:
    """Draw the metric over the steps, a line per trial, with a mark where it was stopped."""
    trials = [trial for trial in search.trials if trial.curve]
    if not trials:
        return None
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axes, colour_of = figure.subplots(), _colours(search, trials)
    for trial in trials:
        points = [(p["step"], p[search.metric]) for p in trial.curve if search.metric in p]
        steps, values = zip(*points, strict=True)
        is_best = trial.name == search.best.name
        axes.plot(
            steps, values, color=colour_of[trial.name], linewidth=2.6 if is_best else 1.1,
            label=f"{trial.name}{' (best)' * is_best}", zorder=3 if is_best else 2,
        )  # fmt: skip
        axes.plot(steps[-1], values[-1], _MARKS[trial.ended], color=colour_of[trial.name], ms=6)
    axes.set_xlabel("step", fontsize=8)
    dress(axes, f"{search.metric}, percent; o: ran to its end, x: stopped early, v: failed")
    columns = 1 + len(trials) // 18
    axes.legend(
        fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=columns
    )
    return png(figure)


def front_picture(search: Search) -> bytes | None:
    """Draw the trials by the two metrics of FRONT; a line joins those that no other one beats."""
    if not (placed := _placed(search)):
        return None
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes, colour_of = figure.subplots(), _colours(search, [t for t, _, _ in placed])
    for trial, x, y in placed:
        axes.plot(x, y, _MARKS[trial.ended], color=colour_of[trial.name], ms=6)
        axes.annotate(trial.name, (x, y), (5, 4), textcoords="offset points", fontsize=7)
    _draw_front(axes, front(search))
    axes.set_xlabel(f"validation {FRONT[0]}, percent", fontsize=8)
    axes.set_ylabel(f"validation {FRONT[1]}, percent", fontsize=8)
    dress(axes, "o: ran to its end (line: their Pareto front), x: stopped early, v: failed")
    return png(figure)


def front(search: Search) -> list[Trial]:
    """Return the whole trials than which none is better in one metric of FRONT and no worse in
    the other, by the first metric."""
    placed = [at for at in _placed(search) if at[0].ended == "ran to its end"]
    kept: list[Trial] = []
    highest = -math.inf
    for trial, _, second in sorted(placed, key=lambda at: (-at[1], -at[2])):
        if second > highest:
            kept, highest = [trial, *kept], second
    return kept


def _placed(search: Search) -> list[tuple[Trial, float, float]]:
    """Return the trials that have both metrics of FRONT."""
    found = [(t, number(t.value(FRONT[0])), number(t.value(FRONT[1]))) for t in search.trials]
    return [(t, x, y) for t, x, y in found if x is not None and y is not None]


def _draw_front(axes: Axes, trials: Sequence[Trial]) -> None:
    corners = [(trial.value(FRONT[0]), trial.value(FRONT[1])) for trial in trials]
    if len(corners) > 1:
        axes.plot(*zip(*corners, strict=True), color=GREY, linewidth=1.0, zorder=1)


class _Scale:
    """Places the values of an axis between 0 and 1, and says what stands there."""

    def __init__(self, low: float, high: float, *, log: bool = False, choices: Sequence[Any] = ()):
        self._low, self._high, self._log, self._choices = low, high, log, list(choices)
        if choices:
            self.ticks = [(self.height(choice), str(choice)) for choice in choices]
        else:
            middle = math.sqrt(low * high) if log else (low + high) / 2
            self.ticks = [(self.height(value), shown(value)) for value in (low, middle, high)]

    @classmethod
    def of_field(cls, distribution: str) -> _Scale:
        found: Any = json_to_distribution(distribution)
        if isinstance(found, CategoricalDistribution):
            return cls(0, max(1, len(found.choices) - 1), choices=found.choices)
        return cls(found.low, found.high, log=found.log)

    @classmethod
    def of_values(cls, values: Sequence[float]) -> _Scale:
        return cls(min(values), max(values))

    def height(self, value: Any) -> float:
        if self._choices:
            value = self._choices.index(value)
        low, high = self._low, self._high
        if self._log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return 0.5 if high == low else (value - low) / (high - low)


def _value(trial: Trial, search: Search) -> float:
    value = number(trial.value(search.metric))
    assert value is not None, "asked of trials that have one"
    return value


def _colours(search: Search, trials: Sequence[Trial]) -> dict[str, Any]:
    """Return a colour per trial, from the worst (dark) to the best (yellow) of them."""
    placed = sorted(trials, key=lambda t: number(t.value(search.metric)) or -math.inf)
    scale = colormaps["viridis"]
    return {t.name: scale(place / max(1, len(placed) - 1) * 0.92) for place, t in enumerate(placed)}

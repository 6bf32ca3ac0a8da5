"""The pictures of the funnel's report."""

from __future__ import annotations

from collections.abc import Callable

from karma_ray.report.funnel_table import STAGES, Delta, Funnel
from karma_ray.report.plots import LINE_COLOURS, dress, new_panels, png

Plot = Callable[[Funnel], bytes | None]
COLOURS = {"over action-only": LINE_COLOURS[0], "over none": LINE_COLOURS[2]}


def differences(funnel: Funnel) -> bytes | None:
    """Draw every difference with its interval, and the published ones, one panel per stage."""
    panels_of = {stage: rows for stage in STAGES if (rows := funnel.of_stage(stage))}
    if not any(row.over_action_only or row.over_none for row in funnel.rows):
        return None
    most = max(len(rows) for rows in panels_of.values())
    figure, panels = new_panels(len(panels_of), width=5.6, height=1.4 + 0.5 * most)
    for axes, (stage, rows) in zip(panels, panels_of.items(), strict=True):
        for place, row in enumerate(rows):
            found = {"over action-only": row.over_action_only, "over none": row.over_none}
            for shift, (name, delta) in zip((-0.12, 0.12), found.items(), strict=True):
                if isinstance(delta, Delta):
                    error = [[delta.mean - delta.low], [delta.high - delta.mean]]
                    axes.errorbar(
                        delta.mean, place + shift, xerr=error, fmt="o", ms=4, capsize=3,
                        color=COLOURS[name], label=None if place else name,
                    )  # fmt: skip
            if row.paper is not None:
                axes.plot(row.paper, place, marker="D", color="#57606a", ms=5, label="paper")
        axes.axvline(0.0, color="#57606a", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("points")
        dress(axes, STAGES[stage])
        handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        axes.legend(handles.values(), handles.keys(), loc="lower right", fontsize=8, frameon=False)
    return png(figure)


def weights(funnel: Funnel) -> bytes | None:
    """Draw the hit rate on validation over the weight w of KARMA's score."""
    if not funnel.curves:
        return None
    figure, (axes,) = new_panels(1, width=6.0, height=3.4)
    for number, (name, points) in enumerate(funnel.curves.items()):
        at, values = zip(*points, strict=True)
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        axes.plot(at, values, label=name, color=colour, linewidth=1.6)
        best = values.index(max(values))
        axes.plot(at[best], values[best], marker="o", color=colour, ms=5)
    axes.set_xlabel("w")
    axes.set_ylabel("percent")
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    dress(axes, f"validation {funnel.facts['prerank_metric']}")
    return png(figure)


FUNNEL_PLOTS: dict[str, tuple[str, str, Plot]] = {
    "differences": (
        "Differences by stage",
        "In points, with 95 % intervals over users and seeds. Diamonds are the paper's.",
        differences,
    ),
    "weights": (
        "Pre-ranking: the weight of KARMA's score",
        "On validation, where it is chosen (dots); w = 0 is the pre-ranker without KARMA.",
        weights,
    ),
}

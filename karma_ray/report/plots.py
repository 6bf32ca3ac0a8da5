"""The plots of a report as PNG bytes. Figures are built without pyplot's global state."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from karma_ray.report.record import Ranked, RunRecord, number

BAR_METRICS = ("HR@10", "HR@50", "NDCG@10", "gAUC")
CURVE_METRICS = ("HR@10", "HR@50", "gAUC")
STAGES = {
    "pretrain": "Pretraining (catalogue text)",
    "warmup": "Stage 1: warm-up",
    "joint": "Stage 2: joint",
    "ctr": "Training: log loss of a click",
}
ROLE_COLOURS = {"floor": "#9aa5b1", "run": "#1f6feb", "ceiling": "#2da44e"}
LINE_COLOURS = ("#1f6feb", "#d1582b", "#2da44e", "#8250df", "#9a6700", "#57606a")
PANEL = (4.2, 3.0)

Plot = Callable[[RunRecord], bytes | None]


def comparison(record: RunRecord) -> bytes | None:
    """Draw floors, this run and ceilings as bars, one panel per metric."""
    rankers = [ranker for ranker in record.rankers() if ranker.metrics]
    metrics = [
        metric for metric in BAR_METRICS if any(r.value(metric) is not None for r in rankers)
    ]
    if not metrics:
        return None
    figure, panels = new_panels(len(metrics), height=0.9 + 0.32 * len(rankers))
    for axes, metric in zip(panels, metrics, strict=True):
        _bars(axes, rankers, metric)
    return png(figure)


def losses(record: RunRecord) -> bytes | None:
    """Draw the loss per term, one panel per stage."""
    curves = {stage: _curves(record.stage_lines(stage), "loss/") for stage in STAGES}
    curves = {stage: lines for stage, lines in curves.items() if lines}
    if not curves:
        return None
    figure, panels = new_panels(len(curves))
    for axes, (stage, lines) in zip(panels, curves.items(), strict=True):
        _draw(axes, lines, STAGES[stage], "loss")
    return png(figure)


def validation(record: RunRecord) -> bytes | None:
    """Draw validation metrics over joint steps, with floors and ceilings as horizontal lines."""
    lines = record.stage_lines("valid")
    curves = {
        metric: points
        for metric in CURVE_METRICS
        if (points := _points(lines, metric) or _points(lines, f"valid/{metric}"))
    }
    if not curves:
        return None
    figure, panels = new_panels(len(curves), width=5.2)
    for axes, (metric, points) in zip(panels, curves.items(), strict=True):
        _draw(axes, {record.recipe: points}, f"validation {metric}", "percent", marker="o")
        _levels(axes, record, metric)
    return png(figure)


def decode_gap(record: RunRecord) -> bytes | None:
    """Draw CE(text | shuffled h) - CE(text | h), which says how well h_t can be decoded."""
    curves = {
        stage: lines
        for stage in ("warmup", "joint")
        if (lines := _curves(record.stage_lines(stage), "decode_gap"))
    }
    if not curves:
        return None
    figure, panels = new_panels(len(curves))
    for axes, (stage, lines) in zip(panels, curves.items(), strict=True):
        _draw(axes, lines, STAGES[stage], "nats per token")
        axes.axhline(0.0, color="#57606a", linewidth=0.8)
    return png(figure)


def collapse(record: RunRecord) -> bytes | None:
    """Draw effective rank and mean cosine of item embeddings e and interests h."""
    lines = record.stage_lines("joint")
    groups = {
        "effective rank": _curves(lines, "collapse/effective_rank"),
        "mean cosine": _curves(lines, "collapse/mean_cosine"),
    }
    groups = {title: curves for title, curves in groups.items() if curves}
    if not groups:
        return None
    figure, panels = new_panels(len(groups))
    for axes, (title, curves) in zip(panels, groups.items(), strict=True):
        _draw(axes, curves, title, title)
    return png(figure)


def negatives(record: RunRecord) -> bytes | None:
    """Draw the number of negatives per step that remain after the false-negative mask."""
    curves = _curves(record.stage_lines("joint"), "negatives/")
    if not curves:
        return None
    figure, panels = new_panels(1)
    _draw(panels[0], curves, "negatives that enter the loss", "count")
    return png(figure)


PLOTS: dict[str, tuple[str, Plot]] = {
    "comparison": ("This run between its floors and ceilings (test)", comparison),
    "validation": ("Validation over steps, with the floors and ceilings", validation),
    "losses": ("Loss per term", losses),
    "decode_gap": ("Decode gap: CE with another user's interest minus CE with the own", decode_gap),
    "collapse": ("Collapse metrics of items e and interests h", collapse),
    "negatives": ("Negatives after masking", negatives),
}


def _points(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    pairs = [(number(line.get("step")), number(line.get(key))) for line in lines]
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _curves(lines: list[dict[str, Any]], prefix: str) -> dict[str, list[tuple[float, float]]]:
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith(prefix))
    return {key: points for key in keys if (points := _points(lines, key))}


def new_panels(
    count: int, width: float = PANEL[0], height: float = PANEL[1]
) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` panels side by side."""
    figure = Figure(figsize=(max(width * count, PANEL[0]), height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _draw(
    axes: Axes,
    curves: dict[str, list[tuple[float, float]]],
    title: str,
    unit: str,
    marker: str | None = None,
) -> None:
    for index, (name, points) in enumerate(curves.items()):
        steps, values = zip(*points, strict=True)
        label = name.split("/")[-1]
        colour = LINE_COLOURS[index % len(LINE_COLOURS)]
        single = marker or ("o" if len(points) == 1 else None)
        axes.plot(steps, values, label=label, color=colour, linewidth=1.6, marker=single, ms=4)
    dress(axes, title)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(axis="y", color="#e1e4e8", linewidth=0.7)
    if len(curves) > 1:
        axes.legend(fontsize=8, frameon=False)


def _levels(axes: Axes, record: RunRecord, metric: str) -> None:
    """Draw floors and ceilings as lines across the panel, with labels that do not overlap."""
    levels: list[tuple[float, str, str]] = []
    for ranker in record.rankers():
        if ranker.role == "run":
            continue
        valid, test = ranker.value(f"valid/{metric}"), ranker.value(metric)
        value = test if valid is None else valid
        if value is not None:
            name = f"{ranker.name} (test)" if valid is None else ranker.name
            levels.append((value, name, ranker.role))
            style = "--" if ranker.role == "ceiling" else ":"
            axes.axhline(value, color=ROLE_COLOURS[ranker.role], linewidth=1.1, linestyle=style)
    axes.margins(x=0.02, y=0.08)
    low, high = axes.get_ylim()
    position, gap = low, 0.06 * (high - low)
    for value, name, role in sorted(levels):
        position = max(value, position + gap)
        axes.annotate(
            name, (1.0, position), xycoords=("axes fraction", "data"), xytext=(3, 0),
            textcoords="offset points", fontsize=7, color=ROLE_COLOURS[role], va="center",
            annotation_clip=False,
        )  # fmt: skip


def _bars(axes: Axes, rankers: list[Ranked], metric: str) -> None:
    shown = [(r, value) for r in rankers if (value := r.value(metric)) is not None]
    values = [value for _, value in shown]
    bars = axes.barh(
        range(len(shown)), values, color=[ROLE_COLOURS[r.role] for r, _ in shown], height=0.7
    )
    axes.bar_label(bars, labels=[f"{value:.1f}" for value in values], fontsize=8, padding=2)
    axes.set_yticks(range(len(shown)), [r.name for r, _ in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max([*values, 1e-9]) * 1.18)
    if metric == "gAUC":
        axes.axvline(50.0, color="#57606a", linewidth=0.8, linestyle=":")
    dress(axes, f"{metric} (%)")


def dress(axes: Axes, title: str) -> None:
    """Give a panel its title, and leave out what says nothing."""
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110)
    return sink.getvalue()

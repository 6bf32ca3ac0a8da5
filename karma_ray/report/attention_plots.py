"""Pictures of attention maps as PNG bytes, as in the paper's Figure 2.

Legend: P heads, S slots.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

Maps = NDArray[np.floating]
MOST_LABELS = 24
"""Largest number of labels along an axis; with more slots, only some are labelled."""
# Little attention is dark; the square root makes weights of a few percent visible.
CONTRAST = PowerNorm(0.5, vmin=0.0, vmax=1.0)
UNSEEN = "#eaeef2"


def attention_grid(
    models: Sequence[tuple[str, Maps]],  # (name, [P, S, S])
    heads: Sequence[tuple[int, int]],
    slots: Sequence[str],
    content: NDArray[np.bool_] | None = None,  # [S]
) -> bytes:
    """Draw models side by side, one row per head, with labels of content columns in red.

    A healthy map has a diagonal and varied rows; a collapsed one vertical stripes (a "barcode").
    """
    panel = min(4.4, max(3.2, 0.19 * len(slots)))
    figure = Figure(
        figsize=(panel * len(models) + 1.8, (panel + 0.4) * len(heads)), layout="constrained"
    )
    grid = figure.subplots(len(heads), len(models), squeeze=False)
    unseen = np.triu(np.ones((len(slots), len(slots)), bool), 1)
    colours = colormaps["magma"].with_extremes(bad=UNSEEN)
    image = None
    for column, (name, maps) in enumerate(models):
        for place, (layer, head) in enumerate(heads):
            axes: Axes = grid[place][column]
            shown = np.ma.masked_array(maps[place], unseen)
            image = axes.imshow(shown, cmap=colours, norm=CONTRAST, interpolation="nearest")
            axes.set_title(f"{name} · layer {layer}, head {head}", fontsize=10)
            _slots(axes, slots, content, named=column == 0)
    if image is not None:
        bar = figure.colorbar(image, ax=grid, shrink=0.6, fraction=0.03, pad=0.01)
        bar.set_label("attention of a row to a column", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    return _png(figure)


def head_grid(rows: Sequence[tuple[str, Maps]], title: str) -> bytes:
    """Draw a measure in percent [layers, heads] per model, with a cell per head."""
    layers, heads = rows[0][1].shape
    width, height = max(2.6, 0.34 * heads + 1.2), max(1.6, 0.26 * layers + 1.0)
    figure = Figure(figsize=(width * len(rows) + 1.0, height), layout="constrained")
    grid = figure.subplots(1, len(rows), squeeze=False)[0]
    image = None
    for axes, (name, values) in zip(grid, rows, strict=True):
        image = axes.imshow(values, cmap="Reds", vmin=0, vmax=100, aspect="auto")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("head", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_xticks(range(0, heads, max(1, heads // 8)))
        axes.set_yticks(range(0, layers, max(1, layers // 8)))
        if layers * heads <= 64:
            for (layer, head), value in np.ndenumerate(values):
                shade = "white" if value > 60 else "#1f2328"
                axes.text(head, layer, f"{value:.0f}", ha="center", va="center", fontsize=8,
                          color=shade)  # fmt: skip
    grid[0].set_ylabel("layer", fontsize=8)
    if image is not None:
        bar = figure.colorbar(image, ax=list(grid), fraction=0.05, pad=0.02)
        bar.set_label(title, fontsize=8)
        bar.ax.tick_params(labelsize=8)
    return _png(figure)


def _slots(
    axes: Axes, slots: Sequence[str], content: NDArray[np.bool_] | None, named: bool
) -> None:
    """Label as many slots as are legible; rows only if `named`."""
    places = range(0, len(slots), -(-len(slots) // MOST_LABELS))
    # Item texts are data: a dollar sign would start a formula in matplotlib.
    words = [slots[place].replace("$", r"\$") for place in places]
    names = [word if len(word) <= 14 else word[:13] + "…" for word in words]
    axes.set_xticks(places, names, rotation=90, fontsize=7.5)
    axes.set_yticks(places, names if named else [""] * len(names), fontsize=7.5)
    for place, label in zip(places, axes.get_xticklabels(), strict=True):
        if content is not None and content[place]:
            label.set_color("#cf222e")
            label.set_fontweight("bold")


def _png(figure: Figure) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110)
    return sink.getvalue()

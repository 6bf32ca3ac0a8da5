"""The plots of a CTR model: reliability, loss and validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from karma_ray.report.plots import dress, losses, new_panels, png
from karma_ray.report.record import RunRecord

Curve = Mapping[str, Sequence[float]]


def reliability(record: RunRecord, curve: Curve) -> bytes | None:
    """Draw the observed against the predicted click rate of bins with equally many items."""
    if not curve.get("predicted"):
        return None
    predicted, observed = ([100 * value for value in curve[n]] for n in ("predicted", "observed"))
    figure, (axes,) = new_panels(1)
    top = 1.05 * max([*predicted, *observed])
    axes.plot([0, top], [0, top], color="#57606a", linewidth=0.8, linestyle=":")
    axes.plot(predicted, observed, color="#1f6feb", marker="o", ms=4, linewidth=1.4)
    axes.set_xlabel("predicted click rate (%)")
    axes.set_ylabel("observed click rate (%)")
    dress(axes, "test pages, in bins of equally many items")
    return png(figure)


def loss(record: RunRecord, curve: Curve) -> bytes | None:
    """Draw the training loss."""
    return losses(record)


PLOTS: dict[str, tuple[str, Callable[[RunRecord, Curve], bytes | None]]] = {
    "reliability": ("Reliability: are the rates right?", reliability),
    "loss": ("Loss over training", loss),
}

"""The report of the funnel: `funnel.json`, pictures, an HTML page and a printed table."""

from __future__ import annotations

import base64

from karma_ray.artifacts import join, write_json
from karma_ray.report.funnel_table import STAGES, Delta, Funnel
from karma_ray.report.rendering import environment, write_bytes

ABSENT = "–"


def render_funnel(funnel: Funnel, folder: str) -> str:
    """Write JSON, PNG files and the page to `folder`; returns the path of the page."""
    from karma_ray.report.funnel_plots import FUNNEL_PLOTS  # here, so that no job waits for it

    facts = {**funnel.facts, "labels": funnel.labels, "notes": funnel.notes}
    write_json({**facts, **_rounded(funnel.metrics)}, join(folder, "funnel.json"))
    pictures = []
    for name, (title, caption, plot) in FUNNEL_PLOTS.items():
        if (content := plot(funnel)) is not None:
            write_bytes(join(folder, f"{name}.png"), content)
            encoded = base64.b64encode(content).decode()
            pictures.append({"title": title, "caption": caption, "base64": encoded})
    stages = [
        {"title": title, "rows": rows, "details": funnel.details.get(stage, [])}
        for stage, title in STAGES.items()
        if (rows := funnel.of_stage(stage))
    ]
    page = join(folder, "report.html")
    template = environment(True).get_template("funnel.html.jinja")
    shown = {"funnel": funnel, "stages": stages, "pictures": pictures, "cell": cell}
    write_bytes(page, template.render(shown).encode())
    return page


def screen(funnel: Funnel) -> str:
    """Return the table that the job prints at its end; at most 40 lines of 120 characters."""
    facts = funnel.facts
    lines = [
        f"{facts['data']}: {facts['num_test']} test clicks of {facts['num_users']} users, "
        f"{facts['num_items']} items; seeds {', '.join(map(str, facts['seeds']))}",
        "",
        f"{'percent; differences in points':<38}{'KARMA':>7}{'action':>8}{'none':>7}"
        f"  {'KARMA - action-only':<25}{'KARMA - none':<25}{'paper':>5}",
    ]
    for stage, title in STAGES.items():
        rows = funnel.of_stage(stage)
        lines += [title] if rows else []
        for row in rows:
            lines.append(
                f"  {row.label:<36}{cell(row.karma):>7}{cell(row.action_only):>8}"
                f"{cell(row.none):>7}  {cell(row.over_action_only):<25}"
                f"{cell(row.over_none):<25}{cell(row.paper, signed=True):>5}"
            )
    ends = [*funnel.labels, *funnel.notes]
    return "\n".join([*lines, *([""] if ends else []), *ends])


def cell(value: float | Delta | None, signed: bool = False) -> str:
    """Return a number or a difference as text."""
    if value is None:
        return ABSENT
    if isinstance(value, Delta):
        return str(value)
    return f"{value:+.2f}" if signed else f"{value:.2f}"


def _rounded(metrics: dict[str, float]) -> dict[str, float]:
    return {name: round(float(value), 6) for name, value in metrics.items()}

"""The page and the sentences of a run that trained a CTR model."""

from __future__ import annotations

import base64
import json
from typing import Any

from karma_ray.artifacts import RunFolder, exists, join, read_json
from karma_ray.report.account import cost_sentences
from karma_ray.report.bars import bar
from karma_ray.report.record import RunRecord, number
from karma_ray.report.rendering import data_rows, environment, write_bytes
from karma_ray.report.standing import (
    format_count,
    format_metric,
    format_short,
    standing,
)

HEADLINE = ("AUC", "gAUC")
ROWS = ("AUC", "gAUC", "logloss", "ECE", "CTR", "predicted_CTR", "num_test", "num_clicks")
SECTIONS = {
    "": "All shown items", "warm/": "Items that training pages showed", "cold/": "New items",
    "valid/": "Validation pages",
}  # fmt: skip
NOTES = {
    "exposed": "", "feedback": "Clicks are ratings above a threshold, others below it.",
    "proxy": "PROXY: the log does not say what was shown; the unclicked items of a page are "
    "similar ones that were on sale, so these are no click-through rates of a real page.",
}  # fmt: skip


def ctr_title(record: RunRecord) -> str:
    """Say what was measured."""
    return (
        f"{record.recipe} on {record.data_name}: {format_count(record.metrics.get('num_test'))} "
        f"shown test items, {format_count(record.metrics.get('num_clicks'))} of them clicked, "
        f"seed {record.config.get('seed', '–')} (AUC and rates in percent)"
    )


def ctr_sentences(record: RunRecord) -> list[str]:
    """Say how good the model is, beside its floor, and how well its rates are calibrated."""
    found = []
    for metric in HEADLINE:
        place = standing(record, metric)
        if place is None:
            continue
        text = f"{metric}: {place.value:.2f}{_interval(record, metric)}"
        if place.floor is not None:
            text += f"; the best floor, {place.floor}, has {format_metric(place.floor_value)}"
        if place.ceiling_value is not None:
            text += f", the ceiling {format_metric(place.ceiling_value)}"
        found.append(text + ".")
    return [*found, *_versus(record), *_calibration(record), *_parts(record), *_note(record)]


def ctr_bars(record: RunRecord) -> list[str]:
    """Return a line per headline metric: the best floor, the run and the ceiling."""
    places = [place for metric in HEADLINE if (place := standing(record, metric)) is not None]
    return [
        f"{place.metric:<5} |{bar(place):<50}| {format_short(place.value)}"
        f" (best floor {format_short(place.floor_value)})"
        for place in places
    ]


def render_ctr(record: RunRecord) -> str:
    """Write report/report.html and its plots; returns the path of the page."""
    from karma_ray.report.ctr_plots import PLOTS  # here, so that no run waits for matplotlib

    folder = RunFolder(record.run)
    path = folder.path("reliability.json")
    curve = read_json(path) if exists(path) else {}
    plots = []
    for name, (title, plot) in PLOTS.items():
        if (picture := plot(record, curve)) is not None:
            write_bytes(join(folder.report, f"{name}.png"), picture)
            plots.append({"title": title, "base64": base64.b64encode(picture).decode()})
    facts = {
        "record": record,
        "title": ctr_title(record),
        "labels": [text for text in record.labels() if "PROXY" not in text] + _note(record),
        "sentences": ctr_sentences(record),
        "plots": plots,
        "rankers": record.rankers(),
        "sections": [
            {"title": title, "rows": rows}
            for prefix, title in SECTIONS.items()
            if (rows := _rows(record, prefix))
        ],
        "data": data_rows(record),
        "account": cost_sentences(record),
        "config": json.dumps(record.config, indent=2, ensure_ascii=False),
    }
    page = join(folder.report, "report.html")
    write_bytes(page, environment(True).get_template("ctr.html.jinja").render(facts).encode())
    return page


def _rows(record: RunRecord, prefix: str) -> list[tuple[str, list[str]]]:
    rows = []
    for metric in ROWS:
        values = [ranker.value(prefix + metric) for ranker in record.rankers()]
        if number(record.metrics.get(prefix + metric)) is not None:
            shape = format_count if metric.startswith("num_") else _precise
            rows.append((metric, [shape(value) for value in values]))
    return rows


def _precise(value: float | None) -> str:
    """Four digits, as a log loss differs in the third decimal."""
    return "–" if value is None else f"{value:.4g}"


def _interval(record: RunRecord, metric: str) -> str:
    low, high = (number(record.metrics.get(f"{metric}_{end}")) for end in ("low", "high"))
    if low is None or high is None:
        return ""
    return f" (95 % interval over users {low:.2f} to {high:.2f})"


def _versus(record: RunRecord) -> list[str]:
    texts = []
    versus: dict[str, dict[str, Any]] = record.checks.get("versus") or {}
    for name, metrics in versus.items():
        parts = []
        for metric, found in metrics.items():
            points, low, high = (100 * found[key] for key in ("difference", "low", "high"))
            parts.append(f"{metric} {points:+.2f} ({low:+.2f} to {high:+.2f})")
        texts.append(f"Difference to {name} in points, with 95 % intervals: {', '.join(parts)}.")
    return texts


def _calibration(record: RunRecord) -> list[str]:
    values = [number(record.metrics.get(n)) for n in ("predicted_CTR", "CTR", "ECE", "logloss")]
    if any(value is None for value in values):
        return []
    predicted, observed, error, loss = values
    return [
        f"Calibration: {predicted:.2f} % are predicted to be clicked and {observed:.2f} % were; "
        f"expected calibration error {error:.2f} points, log loss {loss:.4f}."
    ]


def _parts(record: RunRecord) -> list[str]:
    warm, cold = (number(record.metrics.get(f"{part}/AUC")) for part in ("warm", "cold"))
    if warm is None or cold is None:
        return []
    return [f"AUC of items that training pages showed {warm:.2f}, of new items {cold:.2f}."]


def _note(record: RunRecord) -> list[str]:
    note = NOTES.get(str(record.data.get("negative_source")), "")
    return [note] if note else []

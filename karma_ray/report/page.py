"""The report page of a run: `report/report.html` (self-contained), PNG files, `model_card.md`."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from karma_ray.artifacts import RunFolder, join
from karma_ray.evaluation.alarm import messages
from karma_ray.report.account import (
    cost_sentences,
    forgetting_rows,
    knowledge_sentences,
    llm_sentences,
    size_sentences,
)
from karma_ray.report.channel_table import DEPTHS, list_rows, verdict_of_lists
from karma_ray.report.record import RunRecord, number, read_run
from karma_ray.report.rendering import data_rows, environment, write_bytes
from karma_ray.report.standing import format_count, headline, sections

BARS = "comparison"
"""The plot at the top of the page; the others are shown as curves."""
NUM_FIRST_CASES = 4
"""Number of cases that are visible; the others are folded."""


def render_report(run: str) -> str:
    """Write the report of `run` (local path or URI) and return the path of its HTML page.

    Missing parts (no training, no checks, no cases) are left out. Raises InputError when `run`
    is not a run folder.
    """
    from karma_ray.report.plots import PLOTS  # here, so that no run waits for matplotlib to start

    record = read_run(run)
    if record.is_ctr:
        from karma_ray.report.ctr_page import render_ctr

        return render_ctr(record)
    report = RunFolder(record.run).report
    pictures = {name: plot(record) for name, (_, plot) in PLOTS.items()}
    for name, picture in pictures.items():
        if picture is not None:
            write_bytes(join(report, f"{name}.png"), picture)
    facts = _facts(record) | {
        "plots": [
            {"title": PLOTS[name][0], "base64": base64.b64encode(picture).decode()}
            for name, picture in pictures.items()
            if picture is not None and name != BARS
        ],
        "bars_picture": base64.b64encode(pictures[BARS] or b"").decode(),
        "num_first_cases": NUM_FIRST_CASES,
    }
    page = join(report, "report.html")
    write_bytes(page, environment(True).get_template("report.html.jinja").render(facts).encode())
    card = environment(False).get_template("model_card.md.jinja").render(facts)
    write_bytes(join(report, "model_card.md"), card.encode())
    return page


def _facts(record: RunRecord) -> dict[str, Any]:
    return {
        "record": record,
        "num_test": format_count(record.metrics.get("num_test")),
        "labels": record.labels(),
        "alarms": [message for line in record.lines for message in messages(line)],
        "headline": [*headline(record), *knowledge_sentences(record)],
        "sections": sections(record),
        "has_ceilings": any(ranker.role == "ceiling" for ranker in record.rankers()),
        "tags": _tags(record),
        "lists": list_rows(record),
        "list_depths": DEPTHS,
        "lists_verdict": verdict_of_lists(record),
        "checks": _checks(record),
        "data": data_rows(record),
        "account": [*llm_sentences(record), *size_sentences(record), *cost_sentences(record)],
        "forgetting": forgetting_rows(record),
        "config": json.dumps(record.config, indent=2, ensure_ascii=False),
        "item_encoder": record.checkpoint("item_encoder"),
        "user_decoder": record.checkpoint("user_decoder"),
    }


def _tags(record: RunRecord) -> list[str]:
    result = []
    if record.data.get("query_source") == "derived":
        result.append("HR, NDCG, MRR and JS use DERIVED queries.")
    if record.data.get("negative_source") == "proxy":
        result.append("gAUC uses PROXY negatives.")
    return result


def _checks(record: RunRecord) -> list[tuple[str, str]]:
    """Return (check, result) rows: metrics with other histories, and perturbations of h_t."""
    rows = []
    shuffled: Mapping[str, Any] = record.checks.get("shuffled_history") or {}
    own: Mapping[str, Any] = record.checks.get("own_history") or record.metrics
    for metric in ("HR@10", "HR@50", "NDCG@10", "gAUC"):
        before, after = number(own.get(metric)), number(shuffled.get(metric))
        if before is not None and after is not None:
            rows.append((f"{metric} with others' histories", f"{before:.2f} → {after:.2f}"))
    for key, name in {
        "future_perturbation_max_abs": "largest change of h_t when future items change",
        "same_step_perturbation_max_abs": "largest change of h_t when same-step items change",
    }.items():
        change = number(record.checks.get(key))
        if change is not None:
            rows.append((name, f"{change:g}" + ("" if change == 0 else " (must be 0)")))
    return rows

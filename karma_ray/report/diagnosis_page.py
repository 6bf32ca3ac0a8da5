"""The report of a diagnosis: `diagnosis.json`, pictures, an HTML page and a printed table."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from karma_ray.artifacts import join, write_json
from karma_ray.evaluation.diagnosis import BodyDiagnosis, ModelDiagnosis
from karma_ray.report.attention_plots import attention_grid, head_grid
from karma_ray.report.rendering import environment, write_bytes

ROWS: tuple[tuple[str, str, str], ...] = (
    ("item encoder", "", ""),
    ("collapse/content_sink", "content sinks, %", "heads that focus on one word of the item"),
    ("collapse/sink_first", "sinks at position 1, %", "ordinary in pretrained models"),
    ("collapse/stripe_mass", "stripe mass, %", "attention on the heaviest content columns"),
    ("collapse/row_entropy", "row entropy, 0 to 1", "1: attention is spread evenly"),
    ("collapse/profile_entropy", "profile entropy, nats", "low: rows attend to the same columns"),
    ("user decoder, over items", "", ""),
    ("collapse/user/content_sink", "content sinks, %", "heads that focus on one old item"),
    ("collapse/user/stripe_mass", "stripe mass, %", "attention on the heaviest item columns"),
    ("collapse/user/row_entropy", "row entropy, 0 to 1", "1: attention is spread evenly"),
    ("embeddings", "", ""),
    ("collapse/effective_rank_e", "effective rank of e", "dimensions in which items differ"),
    ("collapse/effective_rank_h", "effective rank of h", "dimensions in which interests differ"),
    ("collapse/mean_cosine_e", "mean cosine of e", "1: all items are alike"),
    ("collapse/mean_cosine_h", "mean cosine of h", "1: all interests are alike"),
    ("collapse/cka_frozen", "CKA(e, frozen e)", "1: same geometry as at the start"),
    ("collapse/category_accuracy", "category from e, %", "linear probe on held-out items"),
    ("collapse/category_majority", "  most frequent category", "its floor"),
    ("collapse/words_from_h", "words of the click from h, %", "variance predicted by a probe"),
    ("collapse/words_from_query", "  from the query alone", "its floor"),
    (
        "collapse/decode_gap",
        "decode gap of h, nats",
        "what the run's own text decoder reads from h",
    ),
)
"""(key, label, meaning) of the rows; a row without a label is a heading."""
ABSENT = "–"


@dataclass(frozen=True)
class Subject:
    """A model, with its name in the comparison."""

    name: str
    facts: dict[str, Any]  # run, recipe, seed; for a frozen model the runs that started from it
    diagnosis: ModelDiagnosis


@dataclass(frozen=True)
class Comparison:
    """Models measured on the same items and requests."""

    subjects: list[Subject]
    facts: dict[str, Any]  # data, numbers and lengths of items and requests, seed
    notes: list[str]  # what was not measured, and why

    def value(self, subject: Subject, key: str) -> float | None:
        """Return a metric, or None if it was not measured."""
        value = subject.diagnosis.metrics.get(key)
        return None if value is None or not math.isfinite(value) else value


def render_diagnosis(comparison: Comparison, folder: str) -> str:
    """Write JSON, PNG files and the page to `folder`; returns the path of the page."""
    write_json(as_json(comparison), join(folder, "diagnosis.json"))
    pictures = []
    for name, (title, caption, content) in _pictures(comparison).items():
        write_bytes(join(folder, f"diagnosis_{name}.png"), content)
        encoded = base64.b64encode(content).decode()
        pictures.append({"title": title, "caption": caption, "base64": encoded})
    rows = [
        {"label": label, "meaning": meaning, "cells": _cells(comparison, key), "heading": key}
        for key, label, meaning in ROWS
    ]
    page = join(folder, "diagnosis.html")
    facts = {"comparison": comparison, "pictures": pictures, "rows": rows}
    write_bytes(page, environment(True).get_template("diagnosis.html.jinja").render(facts).encode())
    return page


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return facts, notes and, per model, all metrics and the measures of every head."""
    return {
        **comparison.facts,
        "notes": comparison.notes,
        "models": {
            subject.name: {
                **subject.facts,
                "metrics": {
                    key: round(value, 6)
                    for key in subject.diagnosis.metrics
                    if (value := comparison.value(subject, key)) is not None
                },
                "heads": {
                    part: {name: _rounded(values) for name, values in body.measures.items()}
                    for part, body in _bodies(subject)
                },
            }
            for subject in comparison.subjects
        },
    }


def screen(comparison: Comparison) -> str:
    """Return the table that a job prints at its end; at most 40 lines."""
    facts, subjects = comparison.facts, comparison.subjects
    lines = [
        f"{facts['data']}: {facts['num_items']} items of {facts['item_length']} tokens, "
        f"{facts['num_held_out']} of them without a click in training; "
        f"{facts['num_requests']} validation requests",
        "",
    ]
    width = max(len(label) for _, label, _ in ROWS) + 4
    columns = [max(10, len(subject.name) + 2) for subject in subjects]
    names = zip(subjects, columns, strict=True)
    lines.append(" " * width + "".join(f"{subject.name:>{size}}" for subject, size in names))
    for key, label, _ in ROWS:
        if not label:
            lines.append(key)
            continue
        cells = zip(_cells(comparison, key), columns, strict=True)
        lines.append(f"  {label:<{width - 2}}" + "".join(f"{cell:>{size}}" for cell, size in cells))
    return "\n".join([*lines, *([""] if comparison.notes else []), *comparison.notes])


def _cells(comparison: Comparison, key: str) -> list[str]:
    percent = key.endswith(("_sink", "sink_first", "_mass", "_accuracy", "_majority"))
    values = [comparison.value(subject, key) for subject in comparison.subjects]
    digits = 1 if percent or "rank" in key else 3
    return [ABSENT if value is None else f"{value:.{digits}f}" for value in values]


def _bodies(subject: Subject) -> list[tuple[str, BodyDiagnosis]]:
    found = subject.diagnosis
    bodies = [("item_encoder", found.item_encoder)]
    return bodies if found.user_decoder is None else [*bodies, ("user_decoder", found.user_decoder)]


def _rounded(values: np.ndarray) -> list[list[float | None]]:
    return [[round(v, 4) if math.isfinite(v) else None for v in row] for row in values.tolist()]


def _pictures(comparison: Comparison) -> dict[str, tuple[str, str, bytes]]:
    """name -> (title, caption, PNG)."""
    subjects = comparison.subjects
    items = [(subject.name, subject.diagnosis.item_encoder) for subject in subjects]
    first = items[0][1]
    found = {
        "example": (
            "Item encoder: one item",
            "Rows attend to columns. Content columns, in which a sink counts, are labelled in red. "
            "Collapse shows as vertical stripes in all rows.",
            attention_grid(
                [(name, body.example_maps) for name, body in items],
                first.heads, first.slots, first.content,
            ),
        ),
        "items": (
            "Item encoder: mean over the items",
            "By position, counted from the left. Stripes of single words are blurred here, those "
            "of positions remain.",
            attention_grid(
                [(name, body.mean_maps) for name, body in items],
                first.heads, [str(place) for place in range(1, len(first.slots) + 1)],
            ),
        ),
        "heads": (
            "Content sinks of every head of the item encoder",
            "Percent of the items in which a content column gets more than 0.3 of the attention.",
            head_grid([(name, body.measures["content_sink"]) for name, body in items], "percent"),
        ),
    }  # fmt: skip
    users = [(s.name, s.diagnosis.user_decoder) for s in subjects if s.diagnosis.user_decoder]
    if users:
        example = users[0][1]
        found["users"] = (
            "User decoder: mean over the requests",
            "Prompt, then query and item of each step; the last query is the current one. "
            "Items in red are content columns, in which a sink counts.",
            attention_grid(
                [(name, body.mean_maps) for name, body in users],
                example.heads, example.slots, example.content,
            ),
        )  # fmt: skip
    return found

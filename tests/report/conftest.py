"""A small finished run, written as a job writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

METRICS = ("HR@10", "HR@50", "HR@200", "HR@1000", "NDCG@10", "MRR", "gAUC", "JS@50")


def metrics_around(value: float) -> dict[str, float]:
    flat = {}
    for prefix in ("", "warm/", "cold/", "first/", "repeat/", "in_query/"):
        flat |= {f"{prefix}{name}": value + place for place, name in enumerate(METRICS)}
        flat[f"{prefix}num_test"] = 1234
    return flat


def training_lines() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for stage, steps in {"pretrain": 60, "warmup": 60, "joint": 200}.items():
        for step in range(0, steps, 20):
            line: dict[str, Any] = {"stage": stage, "step": step, "seconds": step / 10}
            line["loss/total"] = 3 * math.exp(-step / 80) + 1
            if stage == "joint":
                for place, term in enumerate(("action", "generation", "reconstruction")):
                    line[f"loss/{term}"] = math.exp(-step / (60 + 40 * place))
                line["decode_gap"] = 1 - math.exp(-step / 50)
                line["negatives/surviving"] = 30 + step % 3
                line["collapse/effective_rank_e"] = 12 + step / 50
                line["collapse/effective_rank_h"] = 9 + step / 70
                line["collapse/mean_cosine_e"] = 0.3
                line["collapse/mean_cosine_h"] = 0.4
            lines.append(line)
    for step in (50, 100, 150, 200):
        valid = metrics_around(20 + step / 10)
        lines.append(
            {"stage": "valid", "step": step, "HR@50": valid["HR@50"], "gAUC": 50 + step / 10}
        )
    return lines


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., str]:
    """Write the given parts of a run folder; a part set to None is left out."""

    def write(**changes: Any) -> str:
        names = ("popularity", "query_filter", "affinity", "oracle", "taste_oracle")
        levels = (5.0, 20.0, 24.0, 60.0, 50.0)
        parts: dict[str, Any] = {
            "config.json": {"recipe": "karma_text", "seed": 3},
            "metrics.json": metrics_around(40.0),
            "floors.json": {
                name: metrics_around(level) for name, level in zip(names, levels, strict=True)
            },
            "metrics.jsonl": training_lines(),
            "checks.json": {
                "shuffled_history": {"HR@10": 22.0, "HR@50": 23.0, "gAUC": 30.0},
                "future_perturbation_max_abs": 0.0,
                "same_step_perturbation_max_abs": 0.0,
            },
            "report/cases.json": [
                {
                    "query": "red mug",
                    "history": [
                        {"query": "mug", "title": "Blue mug with stars"},
                        {"query": None, "title": "Oak tray"},
                    ],
                    "truth": "Red mug with dots",
                    "rank": 2,
                    "recalled": [
                        {"title": "Red mug with stripes", "score": 31.2, "is_truth": False},
                        {"title": "Red mug with dots", "score": 30.9, "is_truth": True},
                    ],
                    "decoded": "red mug with dots ceramic",
                }
            ],
            "data.json": {
                "name": "toy_shop",
                "query_source": "real",
                "negative_source": "exposed",
                "quarantined": {"null user": 3},
                "notes": ["generated"],
            },
        }
        parts |= {name.replace("__", "."): value for name, value in changes.items()}
        run = tmp_path / "run"
        for name, value in parts.items():
            if value is None:
                continue
            path = run / name
            path.parent.mkdir(parents=True, exist_ok=True)
            records = value if name.endswith("jsonl") else [value]
            path.write_text("\n".join(json.dumps(record) for record in records))
        return str(run)

    return write

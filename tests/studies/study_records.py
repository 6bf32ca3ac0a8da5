"""Records of a small study with known numbers: 40 users, 5 test clicks each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from karma_ray import recipes
from karma_ray.artifacts import read_lines, value_hash, write_bytes, write_lines
from karma_ray.config import override, to_dict
from karma_ray.evaluation.outcomes import Examples, Outcomes
from karma_ray.studies.record_files import in_order
from karma_ray.studies.records import outcomes_path
from karma_ray.studies.tables import TABLES

NUM_USERS, NUM_CLICKS = 40, 200


def outcomes(hits: int, shift: int = 0) -> Outcomes:
    """The first `hits` clicks of every user (of 5) stand at rank 1, the others at 300."""
    number = np.arange(NUM_CLICKS)
    examples = Examples(number // 5, number % 5 == 0, np.arange(NUM_USERS), np.full(NUM_USERS, 4.0))
    rank = np.where(number % 5 < hits, 1, 300)
    if shift:  # the last `shift` users lose theirs
        rank = np.where(number // 5 >= NUM_USERS - shift, 300, rank)
    return Outcomes(examples, rank, rank, np.full(NUM_CLICKS, 0.1), np.full(NUM_USERS, 0.5))


def write_record(
    results: Path, row: str, seed: int, found: Outcomes, *settings: str, **more: Any
) -> None:
    """A record as a study leaves it; its metrics are those of `found`."""
    its = next(r for table in TABLES.values() for r in table.rows if r.name == row)
    config = override(recipes.build(its.built_from), [*its.settings, *settings, f"seed={seed}"])
    parts = found.packed()
    stem = "-".join([row, *(s.split("=")[1] for s in settings), f"seed{seed}"])
    digests = [value_hash(content.hex())[:8] for content in (parts[0], b"".join(parts))]
    for digest, content in zip(digests, parts, strict=True):
        write_bytes(content, outcomes_path(results, digest))
    metrics: dict[str, float] = {"num_test": NUM_CLICKS, "collapse/effective_rank_e": 12.5}
    for name in ("HR@10", "HR@50", "HR@200", "cold/HR@50", "in_query/HR@10", "JS@50", "gAUC"):
        values, _, weights = found.values(name) or (np.zeros(1), None, np.ones(1))
        metrics[name] = float(np.average(values, weights=weights))
    record = {
        "data": "toy", "name": stem, "row": row,
        "recipe": config.recipe, "seed": seed, "data_hash": "d",
        "set": list(settings), "assignments": list(settings), "metrics": metrics,
        "probes": {"decode_gap": 0.25}, "alarms": {"gap": 60}, "steps": 100,
        "seconds": 60.0, "resumed": False,
        "stage_seconds": {"joint": 40.0}, "peak_gib": {"host": 1.5}, "device": "cpu",
        "threads": 1, "commit": "0123456789abcdef", "examples": digests[0],
        "outcomes": digests[1], "config": to_dict(config),
        "curve": [
            {"step": 50, "seconds": 20.0, "HR@50": 10.0},
            {"step": 100, "seconds": 40.0, "HR@50": 30.0},
        ],
    } | more  # fmt: skip
    uri = str(results / "toy.jsonl")
    others = [other for other in read_lines(uri) if other["name"] != stem]
    write_lines(in_order([*others, record]), uri)

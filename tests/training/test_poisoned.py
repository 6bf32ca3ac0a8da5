"""Rows that nobody wants, but logs hold: training takes a finite step with and without them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import torch

from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.loop import fit
from karma_ray.training.optim import build_optimizer
from karma_ray.training.step import JointStep
from tests import tiny


def _nulls(**values: Any) -> dict[str, Any]:
    return tiny.window(["i1", "i2", "i3"]) | values


POISONED: dict[str, dict[str, Any]] = {
    "every id unknown": tiny.window(["gone", "never", "was"]),
    "an empty window": tiny.window([]),
    "an empty window with nulls": tiny.window([]) | {
        name: None for name in ("queries", "timestamps", "page_ids", "hard_negative_ids")
    },
    "no queries": _nulls(queries=None),
    "null queries": _nulls(queries=[None, None, None]),
    "no times": _nulls(timestamps=None),
    "no pages": _nulls(page_ids=None),
    "no negatives": _nulls(hard_negative_ids=None),
    "null negatives": _nulls(hard_negative_ids=[None, ["i4"], None]),
    "unknown negatives": _nulls(hard_negative_ids=[["gone"], ["gone"], []]),
    "nothing to learn": tiny.window(["i1", "i2"], loss=[False, False]),
    "a query of 10 MB": _nulls(queries=["warm scarf " * 950_000, "mug", "boots"]),
    "a query of one endless word": _nulls(queries=["a" * 1_000_000, "mug", "boots"]),
    "a query of control characters": _nulls(queries=["\x00\x01\ud7ff\uffff", "", " "]),
    "one item again and again": tiny.window(["i1"] * 9),
}  # fmt: skip


def _losses(rows: pa.Table) -> list[float]:
    karma = tiny.model()
    found: list[float] = []
    fit(
        karma,
        JointStep(ObjectiveConfig()),
        build_optimizer(karma, learning_rate=1e-3),
        [tiny.batch(rows), tiny.batch(rows)],
        lambda record: found.append(record["loss/total"]),
        steps=2,
        report_every=1,
        precision="float32",
    )
    return found


@pytest.mark.parametrize("name", POISONED)
def test_a_poisoned_row_among_others_does_not_end_the_training(name: str) -> None:
    good = [tiny.window(["i7", "i8", "i9", "i10"]), tiny.window(["i20", "i21", "i22"])]
    losses = _losses(tiny.sequences(good[0], POISONED[name], good[1]))
    assert len(losses) == 2
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[0] > 0


@pytest.mark.parametrize("name", POISONED)
def test_a_batch_of_poisoned_rows_only_does_not_end_the_training(name: str) -> None:
    losses = _losses(tiny.sequences(POISONED[name], POISONED[name]))
    assert all(torch.isfinite(torch.tensor(losses)))

"""Predictions beside what happened: metrics, differences of two models, and floors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from karma_ray.artifacts import join, write_table
from karma_ray.metrics.clicks import auc
from karma_ray.ranking.exposures import EXPOSURES, Exposures
from karma_ray.ranking.floors import STRENGTHS, ItemRates
from karma_ray.ranking.judged import Judged, mean_differences

NUM_ITEMS = 12


@pytest.fixture
def exposures(tmp_path: Path) -> Exposures:
    """80 pages a split, whose items are clicked the more often the higher their row."""
    random = np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        rows = []
        for number in range(80):
            shown = random.permutation(NUM_ITEMS - 1)[:5]
            rows.append({
                "user_id": f"u{number % 9}", "query": "q", "page_id": f"{split}-{number}",
                "history_rows": [], "candidate_rows": shown,
                "clicked": random.random(5) < shown / NUM_ITEMS,
            })  # fmt: skip
        folder = join(str(tmp_path), f"split={split}")
        write_table(pa.Table.from_pylist(rows, schema=EXPOSURES), folder)
    counts = {split: {"pages": 80} for split in ("train", "valid", "test")}
    return Exposures(str(tmp_path), {"counts": counts})


def by_row(rows: pa.Table) -> np.ndarray:
    """Predict the true rates."""
    return np.concatenate(rows.column("candidate_rows").to_pylist()) / NUM_ITEMS


def test_pages_are_judged_in_order_and_the_first_ones_alone_if_asked(exposures: Exposures) -> None:
    judged = Judged.of(exposures, "test", by_row)
    assert len(judged.row) == 400 and judged.page.max() == 79 and judged.user.max() == 8
    metrics = judged.metrics("impressions")
    assert metrics["AUC"] == pytest.approx(100 * auc(judged.chance, judged.clicked))
    assert metrics["CTR"] == pytest.approx(100 * judged.clicked.mean())
    assert metrics["AUC"] > 60 and metrics["gAUC"] > 60
    assert "logloss" not in judged.metrics("impressions", is_chance=False)


def test_a_difference_has_the_sign_of_the_better_model(exposures: Exposures) -> None:
    judged = Judged.of(exposures, "test", by_row)
    other = judged.with_chance(np.full(400, 0.5))
    found = judged.differences(other, "impressions", seed=0)
    for name in ("AUC", "gAUC"):
        alone = judged.metrics("impressions")[name] - 50
        assert 100 * found[name].difference == pytest.approx(alone)
        assert found[name].low > 0


def test_a_difference_over_seeds_is_the_mean_of_those_of_the_seeds(exposures: Exposures) -> None:
    judged = Judged.of(exposures, "test", by_row)
    random = np.random.default_rng(1)
    mine = [judged.with_chance(judged.chance + 0.2 * random.random(400)) for _ in range(3)]
    others = [judged.with_chance(random.random(400)) for _ in range(3)]
    found = mean_differences(mine, others, "impressions", seed=0)
    pairs = zip(mine, others, strict=True)
    seeds = [one.differences(other, "impressions", seed=0) for one, other in pairs]
    for name in ("AUC", "gAUC"):
        mean = np.mean([seed[name].difference for seed in seeds])
        assert found[name].difference == pytest.approx(mean)
        assert found[name].low < mean < found[name].high
    both = mean_differences([judged, judged], [others[0]] * 2, "impressions", seed=0)
    assert both["gAUC"].low == judged.differences(others[0], "impressions", seed=0)["gAUC"].low


def test_the_table_of_pairs_has_those_whose_arms_are_both_there(exposures: Exposures) -> None:
    from benchmarks.ctr_systems import ARMS, PAIRS, pairs

    assert {arm for pair in PAIRS for arm in pair} <= set(ARMS)
    judged = Judged.of(exposures, "test", by_row)
    found = {"fsq": [judged], "rq": [judged.with_chance(np.full(400, 0.5))], "sarm": [judged]}
    head, line = pairs(found, judged.row == 3)  # no page shows two of these
    assert head.startswith("pair") and line.startswith("fsq − rq")
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[1].startswith(f"+{judged.metrics('impressions')['AUC'] - 50:.2f} [+")
    assert cells[4] == "" and pairs({"din": [judged]}, judged.row == 3) == []


def test_predictions_are_saved_and_read(exposures: Exposures, tmp_path: Path) -> None:
    judged = Judged.of(exposures, "valid", by_row)
    judged.save(str(tmp_path / "saved"), "valid")
    again = Judged.load(str(tmp_path / "saved"), "valid")
    assert np.array_equal(again.chance, judged.chance)
    assert again.metrics("uniform") == judged.metrics("uniform")


def test_the_rate_of_an_item_is_smoothed_towards_the_common_one(exposures: Exposures) -> None:
    rates = ItemRates.count(exposures, NUM_ITEMS)
    assert rates.shown.sum() == 400 and not rates.is_warm[NUM_ITEMS - 1]
    assert rates.rates[NUM_ITEMS - 1] == pytest.approx(rates.common)
    raw = rates.clicked[3] / rates.shown[3]
    low, high = sorted((raw, rates.common))
    assert low <= rates.rates[3] <= high
    fitted = rates.fitted(Judged.of(exposures, "valid", by_row))
    assert fitted.strength in STRENGTHS and np.array_equal(fitted.shown, rates.shown)

"""The split is one moment for everybody, and a planted leak is seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from karma_ray.data.config import PrepareConfig
from karma_ray.data.leakage import check_no_leak
from karma_ray.data.preparation import Prepared, prepare_tables
from karma_ray.data.schema import EXAMPLES, SEQUENCES
from karma_ray.data.splits import Cutoffs, choose_cutoffs, to_microseconds
from karma_ray.errors import InputError, LeakError
from tests.data.logs import at, items_table, random_events

HOUR = 3_600_000_000


@pytest.fixture(scope="module")
def result() -> Prepared:
    return prepare_tables(random_events(seed=7), items_table(60), PrepareConfig(max_history=6))


def cutoffs_of(result: Prepared) -> Cutoffs:
    names = ("valid_start", "test_start")
    return Cutoffs(*(to_microseconds(result.facts[name], name) for name in names))


def test_shares_of_the_clicks_fall_on_each_side() -> None:
    times = np.arange(10, dtype=np.int64)
    cutoffs = choose_cutoffs(times, np.full(10, 7), valid_share=0.1, test_share=0.2)
    assert cutoffs == Cutoffs(valid_start=7, test_start=8)
    counts = np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, 91])
    assert choose_cutoffs(times, counts, 0.1, 0.1) == Cutoffs(valid_start=8, test_start=9)


def test_the_order_of_the_clicks_does_not_move_the_cut() -> None:
    generator = np.random.default_rng(0)
    times, counts = generator.integers(50, size=200), generator.integers(1, 5, size=200)
    shuffled = generator.permutation(200)
    first = choose_cutoffs(times, counts, 0.1, 0.1)
    assert choose_cutoffs(times[shuffled], counts[shuffled], 0.1, 0.1) == first


def test_no_page_straddles_a_cut(result: Prepared) -> None:
    cutoffs = cutoffs_of(result)
    trained = {time for row in result.sequences["timestamps"].to_pylist() for time in row}
    valid = set(result.examples["valid"]["timestamp"].to_pylist())
    test = set(result.examples["test"]["timestamp"].to_pylist())
    assert max(trained) < min(valid) <= max(valid) < min(test)
    assert to_microseconds(min(valid), "") == cutoffs.valid_start
    assert to_microseconds(min(test), "") == cutoffs.test_start


def test_planned_cut_points_override_the_shares() -> None:
    times, ones = np.arange(10, dtype=np.int64) * HOUR, np.ones(10, dtype=np.int64)
    plan = {"valid_start": "1970-01-01T02:00:00", "test_start": "1970-01-01T04:00:00+01:00"}
    assert choose_cutoffs(times, ones, 0.1, 0.1, plan) == Cutoffs(2 * HOUR, 3 * HOUR)
    with pytest.raises(InputError, match=r"manifest test_start: 'soon'"):
        choose_cutoffs(times, ones, 0.1, 0.1, {"test_start": "soon"})
    with pytest.raises(InputError, match="lies after test_start"):
        choose_cutoffs(times, ones, 0.1, 0.1, {"valid_start": "1970-01-02"})
    with pytest.raises(InputError, match="leaves no click"):
        choose_cutoffs(times, ones, 0.1, 0.1, {"valid_start": "1970-01-01"})


@pytest.mark.parametrize("shares", [(0.5, 0.5), (-0.1, 0.1), (0.1, 1.0)])
def test_shares_that_leave_nothing_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(InputError, match=r"prepare\.(valid|test)_share"):
        choose_cutoffs(np.arange(10), np.ones(10), *shares)


def test_without_a_test_share_nothing_tests() -> None:
    assert choose_cutoffs(np.arange(10), np.ones(10), 0.2, 0.0) == Cutoffs(8, 10)


def with_cell(table: pa.Table, schema: pa.Schema, row: int, **values: Any) -> pa.Table:
    rows = table.to_pylist()
    rows[row] = {**rows[row], **values}
    return pa.Table.from_pylist(rows, schema=schema)


def test_prepared_data_hold_no_leak(result: Prepared) -> None:
    check_no_leak(result.sequences, result.examples, cutoffs_of(result))


@pytest.mark.parametrize("late", ["later", "same time"])
def test_a_planted_later_click_in_a_history_is_seen(result: Prepared, late: str) -> None:
    table = result.examples["test"]
    history = table["history_timestamps"].to_pylist()
    row = next(n for n, times in enumerate(history) if times)
    time = table["timestamp"][row].as_py()
    planted = [*history[row][:-1], time if late == "same time" else at(10_000)]
    leaky = with_cell(table, EXAMPLES, row, history_timestamps=planted)
    with pytest.raises(LeakError, match="test examples: the history holds a click"):
        check_no_leak(result.sequences, {"test": leaky}, cutoffs_of(result))


def test_a_planted_late_training_step_is_seen(result: Prepared) -> None:
    cutoffs = cutoffs_of(result)
    times = result.sequences["timestamps"][0].as_py()
    planted = [*times[:-1], at(10_000)]
    leaky = with_cell(result.sequences, SEQUENCES, 0, timestamps=planted)
    with pytest.raises(LeakError, match="not before valid_start"):
        check_no_leak(leaky, result.examples, cutoffs)
    row = next(n for n, w in enumerate(result.sequences["timestamps"].to_pylist())
               if w[0] < w[-1])  # fmt: skip
    planted = result.sequences["timestamps"][row].as_py()[::-1]
    leaky = with_cell(result.sequences, SEQUENCES, row, timestamps=planted)
    with pytest.raises(LeakError, match="older than the one before it"):
        check_no_leak(leaky, result.examples, cutoffs)


def test_other_planted_leaks_are_seen(result: Prepared) -> None:
    cutoffs, table = cutoffs_of(result), result.examples["valid"]
    with pytest.raises(LeakError, match="outside its split's span"):
        check_no_leak(result.sequences, {"test": table}, cutoffs)
    user = result.sequences["user_id"][0].as_py()
    page = result.sequences["page_ids"][0].as_py()[0]
    leaky = with_cell(table, EXAMPLES, 0, page_id=page, user_id=user)
    with pytest.raises(LeakError, match="trained on and evaluated"):
        check_no_leak(result.sequences, {"valid": leaky}, cutoffs)
    clicked = [table["positive_item_id"][0].as_py()]
    leaky = with_cell(table, EXAMPLES, 0, hard_negative_ids=clicked)
    with pytest.raises(LeakError, match="hard negative was clicked"):
        check_no_leak(result.sequences, {"valid": leaky}, cutoffs)

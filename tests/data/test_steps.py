"""Lists become padded steps; what a window lacks is null."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from karma_ray.data.steps import TRAINING, Steps, catalog_rows, elements, list_sizes, places
from tests import tiny

WORDS = pa.list_(pa.string())


def test_elements_of_windows_without_a_list_are_null() -> None:
    column = pa.chunked_array([pa.array([["a", "b"], None], WORDS), pa.array([[], ["c"]], WORDS)])
    assert list_sizes(column).tolist() == [2, 0, 0, 1]
    assert elements(column, np.array([2, 1, 2, 1])).to_pylist() == [
        "a", "b", None, None, None, "c",
    ]  # fmt: skip


def test_elements_of_a_slice_are_its_own() -> None:
    table = pa.table({"words": pa.array([["a"], ["b", "c"], ["d"]], WORDS)}).slice(1, 1)
    assert elements(table.column("words"), np.array([2])).to_pylist() == ["b", "c"]


@pytest.mark.parametrize("sizes", [[1], [3], [0]])
def test_lists_of_one_row_that_differ_in_length_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="differ in length"):
        elements(pa.chunked_array([pa.array([["a", "b"]], WORDS)]), np.array(sizes))


def test_places_count_within_each_window() -> None:
    assert places(np.array([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]
    assert places(np.zeros(0, np.int64)).tolist() == []


def test_missing_ids_are_unknown_items() -> None:
    ids = pa.array(["i3", None, "never seen", "i3"])
    assert catalog_rows(tiny.catalog(), ids).tolist() == [3, -1, -1, 3]
    assert catalog_rows(tiny.catalog(), ids[:0]).tolist() == []


def test_steps_say_which_list_elements_they_are() -> None:
    rows = tiny.sequences(
        tiny.window(["i0", "gone", "i1", "i2"]), tiny.window(["gone"]), tiny.window(["i3"])
    )
    steps = Steps.of(rows, TRAINING, tiny.catalog(), 2)
    assert steps.kept.tolist() == [2, 3, 5]
    assert steps.window.tolist() == [0, 0, 2]
    assert steps.step.tolist() == [0, 1, 0]
    assert steps.items.tolist() == [[1, 2], [0, 0], [3, 0]]
    assert steps.item_mask.tolist() == [[True, True], [False, False], [True, False]]


def test_equal_queries_have_one_number_and_empty_ones_none() -> None:
    rows = tiny.sequences(tiny.window(["i0"] * 4, queries=["mug", "", None, "mug"]))
    steps = Steps.of(rows, TRAINING, tiny.catalog(), 20)
    assert [steps.texts[number] for number in steps.query[0]] == ["mug", "", "", "mug"]
    assert steps.query[0].tolist() == [1, 0, 0, 1]

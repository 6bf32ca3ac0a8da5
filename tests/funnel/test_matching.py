"""Merged lists of channels by hand, and what one more channel adds at the same size."""

from __future__ import annotations

import numpy as np

from karma_ray.funnel.matching import CHANNELS, Matched, best_rows, joined, merged


def matched(lists: np.ndarray, size: int) -> Matched:
    rows, turns = merged(lists, size)
    nothing = np.zeros((len(rows), 0))
    return Matched(rows, turns, nothing.astype(np.float32), nothing.astype(np.int64))


def test_channels_take_turns_and_an_item_counts_once() -> None:
    lists = np.array([[[1, 2, 3]], [[2, 4, 5]], [[1, 6, -1]]])
    rows, turns = merged(lists, 6)
    # Round 1: 1, 2 (1 again); round 2: (2 again) 4, 6; round 3: 3, 5 (no third).
    assert rows.tolist() == [[1, 2, 4, 6, 3, 5]]
    assert turns.tolist() == [[1, 2, 6, 7, 9, 10]]
    assert merged(lists, 8)[0].tolist() == [[1, 2, 4, 6, 3, 5, -1, -1]]


def test_one_more_channel_takes_places_of_the_others() -> None:
    assert len(CHANNELS) == 3
    lists = np.array([[[1, 2, 3, 9]], [[2, 4, 5, 8]], [[1, 6, 7, 0]]])
    without = matched(lists, 5)
    assert without.rows.tolist() == [[1, 2, 4, 6, 3]]
    own = np.array([[6, 1, 12, 13, 14]])
    # Rounds: 6 | 1 2; (1) | 4; 12 -- of the same size, so 3 had to go.
    assert joined(own, without, 5).tolist() == [[6, 1, 2, 4, 12]]


def test_a_channel_that_repeats_the_others_adds_nothing() -> None:
    lists = np.array([[[1, 2, 3]], [[1, 2, 3]], [[1, 2, 3]]])
    without = matched(lists, 3)
    assert joined(np.array([[1, 2, 3]]), without, 3).tolist() == without.rows.tolist()


def test_a_channel_ends_where_it_knows_nothing() -> None:
    scores = np.array([[0.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
    order = np.array([3, 2, 1, 0])
    assert best_rows(scores, 3, order, only_positive=True).tolist() == [[1, 2, -1], [3, -1, -1]]
    assert best_rows(scores, 3, order, only_positive=False).tolist() == [[1, 2, 3], [3, 2, 1]]


def test_one_list_for_all_requests_is_made_once() -> None:
    scores = np.broadcast_to(np.array([1.0, 3.0, 2.0]), (4, 3))
    found = best_rows(scores, 2, np.arange(3), only_positive=True)
    assert found.tolist() == [[1, 2]] * 4


def test_stored_lists_are_the_same() -> None:
    lists = np.array([[[1, 2, 3]], [[2, 4, 5]], [[1, 6, -1]]])
    before = matched(lists, 8)
    after = Matched.unpacked(before.packed())
    for name in ("rows", "turns", "affinity", "ranks"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))

"""Long work says how far it is, how fast, and how long the rest will take."""

from __future__ import annotations

import logging

import pytest

from karma_ray.data.progress import told


def test_lines_name_items_speed_and_time_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert list(told([4, 3, 2], int, 9, "embedding", every=0.0)) == [4, 3, 2]
    assert [line.split(" items, ")[0] for line in caplog.messages] == [
        "embedding: 7 of 9", "embedding: 9 of 9",
    ]  # fmt: skip
    assert all(line.endswith("left") and "items/s" in line for line in caplog.messages)


def test_few_lines_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        list(told(range(1, 101), lambda part: 1, 200, "embedding"))
    assert not caplog.messages

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from karma_ray.errors import InputError
from karma_ray.runs import node_hours
from karma_ray.runs.node_hours import NodeHours, read_hours, this_machine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have passed; tests move them."""
    now = [0.0]
    monkeypatch.setattr(node_hours.time, "monotonic", lambda: now[0])
    return now


def test_hours_of_machines_that_come_and_go_are_added(tmp_path: Path, clock: list[float]) -> None:
    up = {"8 CPU": 1}
    with NodeHours(str(tmp_path), lambda: up, period=3600) as hours:
        clock[0] = 1800
        hours._add()
        up["8 CPU, 1 GPU (A10G)"] = 4
        clock[0] = 5400
    assert read_hours(str(tmp_path)) == {"8 CPU": 1.5, "8 CPU, 1 GPU (A10G)": 4.0}


def test_a_run_that_is_continued_adds_to_its_hours(tmp_path: Path, clock: list[float]) -> None:
    for end in (3600, 9000):
        with NodeHours(str(tmp_path), this_machine, period=3600):
            clock[0] = end
    assert read_hours(str(tmp_path)) == {"this machine": 2.5}


def test_a_job_that_is_killed_leaves_what_it_noted(tmp_path: Path) -> None:
    noted, counted = threading.Event(), []

    def count() -> dict[str, int]:
        counted.append(1)
        if len(counted) > node_hours.SAVE_EVERY:
            noted.set()
        return {"this machine": 1}

    with NodeHours(str(tmp_path), count, period=0.01):
        assert noted.wait(60)
        assert set(read_hours(str(tmp_path))) == {"this machine"}


def test_a_cluster_that_does_not_answer_counts_as_before(
    tmp_path: Path, clock: list[float]
) -> None:
    answers = [{"4 CPU": 2}, None]

    def count() -> dict[str, int]:
        answer = answers.pop(0)
        if answer is None:
            raise ConnectionError("gone")
        return answer

    with NodeHours(str(tmp_path), count, period=3600) as hours:
        clock[0] = 3600
        hours._add()
        clock[0] = 7200
    assert read_hours(str(tmp_path)) == {"4 CPU": 4.0}


def test_a_mistake_in_a_flag_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError), NodeHours(str(tmp_path / "run"), this_machine):
        raise InputError("--out", "run", "already holds a run")
    assert not (tmp_path / "run").exists()

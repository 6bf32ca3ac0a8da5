from __future__ import annotations

from pathlib import Path

import pytest

from karma_ray.artifacts import read_lines
from karma_ray.cluster.run_log import ProgressLine, RunLog


def _write(run: Path, steps: range, start: int = 0) -> None:
    log = RunLog(str(run), "joint", start)
    for step in steps:
        log.add({"step": step, "seconds": 2.0, "loss/total": 1.0 / step})
    log.close()


def test_seconds_add_up_over_a_stage(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 4))
    assert [line["seconds"] for line in read_lines(f"{tmp_path}/metrics.jsonl")] == [2.0, 4.0, 6.0]


def test_resuming_drops_the_lines_after_the_checkpoint(tmp_path: Path) -> None:
    other = RunLog(str(tmp_path), "warmup")
    other.add({"step": 9, "seconds": 1.0})
    other.close()
    _write(tmp_path, range(1, 6))
    _write(tmp_path, range(4, 5), start=3)
    lines = list(read_lines(f"{tmp_path}/metrics.jsonl"))
    found = [(line["stage"], line["step"], line["seconds"]) for line in lines]
    joint = [("joint", step, 2.0 * step) for step in range(1, 5)]
    assert found == [("warmup", 9, 1.0), *joint]


def test_the_progress_line_ends_at_the_last_reported_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ProgressLine(str(tmp_path), "joint", 8):
        _write(tmp_path, range(1, 9))
    shown = capfd.readouterr().err
    assert "8/8" in shown
    assert "loss 0.125" in shown

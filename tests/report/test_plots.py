from __future__ import annotations

import pytest

from karma_ray.report import plots
from karma_ray.report.record import read_run


@pytest.mark.parametrize("name", plots.PLOTS)
def test_a_picture_is_drawn_from_what_a_run_writes(write_run, name: str) -> None:
    picture = plots.PLOTS[name][1](read_run(write_run()))
    assert picture is not None and picture.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", plots.PLOTS)
def test_nothing_to_show_is_no_picture(write_run, name: str) -> None:
    run = write_run(**dict.fromkeys(("metrics.json", "floors.json", "metrics.jsonl")))
    assert plots.PLOTS[name][1](read_run(run)) is None


def test_a_single_report_and_missing_numbers_can_be_drawn(write_run) -> None:
    lines = [
        {"stage": "joint", "step": 1, "loss/action": 0.5, "loss/generation": None},
        {"stage": "valid", "step": 1, "HR@10": float("nan"), "HR@50": 3.0},
    ]
    record = read_run(write_run(**{"metrics.jsonl": lines}))
    assert plots.losses(record) is not None
    assert plots.validation(record) is not None


def test_the_validation_curve_is_found_under_either_key(write_run) -> None:
    for key in ("HR@50", "valid/HR@50"):
        record = read_run(write_run(**{"metrics.jsonl": [{"stage": "valid", "step": 5, key: 2.0}]}))
        assert plots.validation(record) is not None

from __future__ import annotations

from karma_ray.report.bars import WIDTH, bar, bars
from karma_ray.report.record import read_run
from karma_ray.report.standing import Standing


def test_a_bar_shows_the_floor_what_is_gained_and_the_room_above() -> None:
    place = Standing("HR@10", 30.0, "tfidf", 20.0, 60.0)
    assert bar(place) == "=" * 10 + "#" * 5 + "." * 15


def test_below_its_floor_a_run_shows_what_is_missing() -> None:
    place = Standing("HR@10", 10.0, "tfidf", 20.0, 60.0)
    assert bar(place) == "=" * 5 + "-" * 5 + "." * 20


def test_without_floor_or_ceiling_the_bar_is_the_run_alone() -> None:
    assert bar(Standing("HR@10", 10.0, None, None, None)) == "#" * 5


def test_a_run_above_its_ceiling_has_no_room_left_and_100_percent_fills_the_line() -> None:
    assert bar(Standing("HR@10", 100.0, "tfidf", 0.0, 50.0)) == "#" * WIDTH


def test_every_measured_headline_metric_has_a_line_and_the_legend_names_what_is_drawn(
    write_run,
) -> None:
    lines = bars(read_run(write_run(**{"metrics.json": {"HR@10": 40.0, "gAUC": 60.0}})))
    assert [line.split()[0] for line in lines[:2]] == ["HR@10", "gAUC"]
    assert "this run above it" in lines[-1] and "missing" not in lines[-1]
    assert all(line.isascii() for line in lines)
    assert bars(read_run(write_run(**{"metrics.json": {"MRR": 40.0}}))) == []

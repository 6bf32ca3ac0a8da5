from __future__ import annotations

from karma_ray.report.page import render_report
from karma_ray.report.terminal import summary


def test_the_run_stands_between_its_floors_and_its_ceilings(write_run) -> None:
    text = summary(write_run())
    order = ["popularity", "affinity", "> karma_text (this run)", "oracle (ceiling)"]
    places = [text.index(name) for name in order]
    assert places == sorted(places)


def test_the_summary_fits_one_screen(write_run) -> None:
    lines = summary(write_run()).splitlines()
    assert len(lines) <= 40
    # The run's own path may be any length.
    assert all(len(line) <= 100 for line in lines if "run" not in line.split("/"))


def test_it_ends_with_the_run_folder_and_the_next_command(write_run) -> None:
    run = write_run()
    render_report(run)
    folder, report, following = summary(run).splitlines()[-3:]
    assert folder.endswith(run)
    assert report.endswith(f"{run}/report/report.html")
    assert following.endswith(f"python jobs/serve.py {run}")


def test_quarantined_rows_are_counted_with_their_reasons(write_run) -> None:
    data = {"name": "shop", "quarantined": {"null user": 3, "unknown item": 12000}}
    text = summary(write_run(**{"data.json": data}))
    assert "Quarantined rows: null user 3, unknown item 12,000." in text


def test_labels_of_the_data_are_on_the_screen(write_run) -> None:
    data = {"name": "hm", "query_source": "derived", "negative_source": "proxy"}
    text = summary(write_run(**{"data.json": data}))
    assert "DERIVED" in text and "PROXY" in text


def test_a_floor_run_is_not_offered_for_serving(write_run) -> None:
    run = write_run(**{"config.json": {"recipe": "tfidf", "seed": 0}, "floors.json": None})
    assert "serve" not in summary(run)


def test_empty_sections_take_no_line(write_run) -> None:
    run = write_run(**{"metrics.json": {"HR@10": 1.0, "num_test": 5, "cold/num_test": 0}})
    assert "cold items" not in summary(run)


def test_a_collapse_alarm_is_on_the_screen(write_run) -> None:
    lines = [{"stage": "joint", "step": 80, "decode_gap": 0.01, "alarm/decode_gap": 0.02}]
    text = " ".join(summary(write_run(**{"metrics.jsonl": lines})).split())
    assert "Collapse alarm at step 80: the decode gap (nats per token) is 0.01, below 0.02" in text
    assert "Collapse alarm" not in summary(write_run())

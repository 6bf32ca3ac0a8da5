from __future__ import annotations

from karma_ray.report.page import render_report
from karma_ray.report.terminal import summary


def test_the_screen_opens_with_a_line_each_for_all_clicks_warm_and_new_items(write_run) -> None:
    floors = {
        "popularity": {"HR@10": 30.0, "HR@50": 30.0, "gAUC": 45.0, "cold/HR@10": 60.0},
        "oracle": {"HR@10": 99.0, "cold/HR@10": 99.0},
    }
    lines = summary(write_run(**{"floors.json": floors})).splitlines()
    assert lines[2] == "All test clicks (1,234): above every floor on HR@10, HR@50 and gAUC."
    assert lines[3] == "New items (1,234): HR@10 40.0 is not above popularity's 60.0."


def test_a_case_shows_query_history_recalled_titles_and_the_decoded_words(write_run) -> None:
    text = summary(write_run())
    assert (
        "a hit     query: red mug\n"
        "history   Blue mug with stars | Oak tray\n"
        "clicked   Red mug with dots (rank 2)\n"
        "recalled    Red mug with stripes\n"
        "          * Red mug with dots\n"
        "h_t says  red mug with dots ceramic"
    ) in text


def test_the_first_hit_and_the_first_miss_are_shown(write_run) -> None:
    def case(query: str, hit: bool) -> dict[str, object]:
        recalled = [{"title": "Mug", "score": 1.0, "is_truth": hit}]
        return {"query": query, "history": [], "truth": "Mug", "rank": 1, "recalled": recalled}

    cases = [case("one", False), case("two", False), case("three", True), case("four", True)]
    text = summary(write_run(**{"report/cases.json": cases}))
    assert "a hit     query: three" in text and "a miss    query: one" in text
    assert "query: two" not in text and "query: four" not in text


def test_a_title_of_any_length_stays_on_its_line(write_run) -> None:
    hit = {"title": "x" * 90 + " and much more", "score": 1.0, "is_truth": False}
    case = {"query": "", "history": None, "truth": "y " * 200, "rank": None, "recalled": [hit]}
    lines = summary(write_run(**{"report/cases.json": [case]})).splitlines()
    assert "a miss    query: (none)" in lines and "history   (empty)" in lines
    assert all(len(line) <= 100 for line in lines if "run" not in line.split("/"))


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


def test_after_a_ctr_run_it_is_served_beside_the_run_of_its_vectors(write_run) -> None:
    config = {"recipe": "ctr_simtier", "seed": 0, "ranking": {"vectors": "runs/first"}}
    run = write_run(**{"config.json": config})
    assert summary(run).endswith(f"python jobs/serve.py runs/first --ranker {run}")


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
    assert "New items" not in summary(run)


def test_a_collapse_alarm_is_on_the_screen(write_run) -> None:
    lines = [{"stage": "joint", "step": 80, "decode_gap": 0.01, "alarm/decode_gap": 0.02}]
    text = " ".join(summary(write_run(**{"metrics.jsonl": lines})).split())
    assert "Collapse alarm at step 80: the decode gap (nats per token) is 0.01, below 0.02" in text
    assert "Collapse alarm" not in summary(write_run())

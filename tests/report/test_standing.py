from __future__ import annotations

import pytest

from karma_ray.report.record import read_run
from karma_ray.report.standing import headline, sections, standing


def test_the_best_floor_is_the_strongest_one_on_that_metric(write_run) -> None:
    floors = {
        "popularity": {"HR@50": 30.0, "gAUC": 50.0},
        "affinity": {"HR@50": 10.0, "gAUC": 58.0},
    }
    record = read_run(write_run(**{"floors.json": floors}))
    hit_rate, gauc = standing(record, "HR@50"), standing(record, "gAUC")
    assert hit_rate is not None and (hit_rate.floor, hit_rate.floor_value) == ("popularity", 30.0)
    assert gauc is not None and (gauc.floor, gauc.floor_value) == ("affinity", 58.0)


def test_of_equal_floors_the_simplest_is_named(write_run) -> None:
    """Without queries both filters let everything through."""
    names = ("popularity", "query_filter", "query_filter_popular")
    floors = {name: {"HR@50": 30.0} for name in names}
    place = standing(read_run(write_run(**{"floors.json": floors})), "HR@50")
    assert place is not None and place.floor == "popularity"


def test_the_share_of_the_way_is_0_at_the_floor_and_100_at_the_oracle(write_run) -> None:
    floors = {"affinity": {"gAUC": 50.0}, "oracle": {"gAUC": 80.0}}
    for value, share in ((50.0, 0.0), (65.0, 50.0), (80.0, 100.0)):
        run = write_run(**{"metrics.json": {"gAUC": value}, "floors.json": floors})
        place = standing(read_run(run), "gAUC")
        assert place is not None and place.share_of_the_way == pytest.approx(share)


def test_an_equal_floor_is_not_passed(write_run) -> None:
    run = write_run(**{"metrics.json": {"gAUC": 58.0}, "floors.json": {"affinity": {"gAUC": 58.0}}})
    place = standing(read_run(run), "gAUC")
    assert place is not None and not place.passes
    assert headline(read_run(run))[0].endswith("gAUC 58.0 is not above affinity's 58.0.")


def test_a_ceiling_is_never_taken_for_a_floor(write_run) -> None:
    run = write_run(**{"metrics.json": {"gAUC": 60.0}, "floors.json": {"oracle": {"gAUC": 90.0}}})
    place = standing(read_run(run), "gAUC")
    assert place is not None and place.floor is None and place.ceiling_value == 90.0


def test_an_unmeasured_metric_has_no_standing(write_run) -> None:
    run = write_run(**{"metrics.json": {"gAUC": float("nan")}})
    assert standing(read_run(run), "gAUC") is None
    assert standing(read_run(run), "HR@10") is None


def test_sections_hold_a_cell_per_ranker_and_leave_out_what_nobody_measured(write_run) -> None:
    run = write_run(
        **{
            "metrics.json": {"HR@10": 5.0, "num_test": 7, "cold/HR@10": 1.0, "cold/num_test": 2},
            "floors.json": {"popularity": {"HR@10": 3.0}},
        }
    )
    tables = sections(read_run(run))
    assert [table.title.split()[0] for table in tables] == ["All", "Cold"]
    assert [cell.text for cell in tables[0].rows[0][1]] == ["3.00", "5.00"]
    assert [cell.text for cell in tables[1].rows[0][1]] == ["–", "1.00"]
    assert tables[1].num_test == "2"


def test_a_history_that_does_not_matter_is_said_to_be_unused(write_run) -> None:
    unused = {"shuffled_history": {"HR@50": 99.0}}
    assert any("NOT used" in s for s in headline(read_run(write_run(**{"checks.json": unused}))))


def test_a_change_of_h_by_a_future_item_is_called_a_leak(write_run) -> None:
    leak = {"future_perturbation_max_abs": 0.25}
    sentences = headline(read_run(write_run(**{"checks.json": leak})))
    assert any("future items" in s and "A LEAK" in s for s in sentences)


def test_below_its_floor_a_run_is_not_said_to_be_on_the_way(write_run) -> None:
    floors = {"affinity": {"gAUC": 60.0}, "oracle": {"gAUC": 90.0}}
    run = write_run(**{"metrics.json": {"gAUC": 55.0}, "floors.json": floors})
    assert not any("of the way" in sentence for sentence in headline(read_run(run)))

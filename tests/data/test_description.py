"""The numbers of a data folder against counts by hand over all rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from karma_ray.artifacts import write_table
from karma_ray.data import description
from karma_ray.data.config import PrepareConfig
from karma_ray.data.description import describe
from karma_ray.data.splits import to_microseconds
from karma_ray.errors import InputError
from karma_ray.runs.preparation import prepare
from tests.data.logs import event, events_table, items_table


def write_data(folder: Path, rows: list[dict[str, Any]], num_items: int = 30) -> str:
    for number in range(2):  # two files
        write_table(events_table(rows[number::2]), str(folder / "events"), f"part-{number:05d}")
    write_table(items_table(num_items), str(folder / "items"))
    return str(folder)


def shop() -> list[dict[str, Any]]:
    """People with 1 to 12 pages, repeats, a gap of days, queries and exposures on some pages."""
    rows = []
    for user in range(12):
        for page in range(user + 1):
            item = f"i{(user * page) % 9}"
            shown = [item, f"i{page % 9 + 9}"] if page % 2 else None
            hours = page * 30 + user + (200 if page > 6 else 0)
            query = None if page % 3 == 0 else f"red {'big ' * (page % 2)}lamp"
            rows.append(event(f"u{user}", hours, [item], shown, query, session=f"s{user}"))
    return rows


def test_counts_are_those_of_the_rows(tmp_path: Path) -> None:
    rows = shop()
    found = describe(write_data(tmp_path, rows))
    clicks = Counter(item for row in rows for item in row["clicked_item_ids"])
    assert found["counts"] == {
        "users": 12, "items": 30, "events": len(rows), "clicks": sum(clicks.values()),
        "purchases": 0, "clicked_items": len(clicks), "sessions": 12, "events_without_time": 0,
    }  # fmt: skip
    assert found["history"]["max"] == 12 and found["history"]["quantiles"]["0.5"] == 6
    assert sum(bar["count"] for bar in found["history"]["histogram"]) == 12
    pairs = {(row["user_id"], item) for row in rows for item in row["clicked_item_ids"]}
    assert found["repeats"]["share"] == pytest.approx(1 - len(pairs) / len(rows))
    assert found["repeats"]["of_users"] == 1
    shown = [row for row in rows if row["exposed_item_ids"]]
    assert found["exposures"]["pages"] == found["exposures"]["pages_with_negatives"] == len(shown)
    assert found["exposures"]["per_click"] == 2.0
    assert found["popularity"]["never_clicked"] == 30 - len(clicks)
    top = sum(count for _, count in clicks.most_common(3)) / sum(clicks.values())
    assert found["popularity"]["top_shares"]["0.1"] == pytest.approx(top)


def test_days_and_queries_are_those_of_the_rows(tmp_path: Path) -> None:
    rows = shop()
    found = describe(write_data(tmp_path, rows))
    days = Counter(row["timestamp"].date().isoformat() for row in rows)
    assert dict((day, events) for day, events, _ in found["time"]["per_day"]) == days
    assert found["time"]["empty_days"] == found["time"]["days"] - len(days) > 0
    asked = Counter(row["query"] for row in rows if row["query"])
    assert {q["query"]: q["count"] for q in found["queries"]["top"]} == asked
    assert found["queries"]["words"]["max"] == 3


def test_cold_clicks_are_those_on_items_without_a_click_before(tmp_path: Path) -> None:
    rows = [*shop(), event("u1", 900, ["i25"]), event("u2", 901, ["i0", "i26"])]
    data = write_data(tmp_path, rows)
    before = describe(data)
    facts = prepare(data, PrepareConfig())
    after = describe(data)
    assert before["splits"] == after["splits"] and after["cutoffs"]["of"] == "prepared.json"
    start = to_microseconds(facts["test_start"], "test")
    valid = to_microseconds(facts["valid_start"], "valid")
    clicks = [(to_microseconds(row["timestamp"], "t"), item)
              for row in rows for item in row["clicked_item_ids"]]  # fmt: skip
    trained = {item for time, item in clicks if time < valid}
    test = [item for time, item in clicks if time >= start]
    assert after["splits"]["test"] == {
        "clicks": len(test), "cold_share": sum(i not in trained for i in test) / len(test)
    }  # fmt: skip
    assert after["splits"]["test"]["cold_share"] > 0
    assert sum(split["clicks"] for split in after["splits"].values()) == len(clicks)


def test_pairs_of_a_large_log_are_counted_for_some_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data(tmp_path, shop())
    monkeypatch.setattr(description, "PAIR_EVENTS", 40)
    found = describe(data)["repeats"]
    assert found["of_users"] == 0.5 and 0 <= found["share"] < 1


def test_a_damaged_file_is_told_and_the_rest_counted(tmp_path: Path) -> None:
    data = write_data(tmp_path, shop())
    file = tmp_path / "events" / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    found = describe(data)
    assert found["quarantine"]["damaged"] == {"file cannot be read": 1}
    assert found["counts"]["events"] == len(shop()) // 2


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        describe(str(tmp_path / "gone"))
    with pytest.raises(InputError, match="has no events/"):
        describe(str(tmp_path))


def test_rows_without_times_or_clicks_are_no_obstacle(tmp_path: Path) -> None:
    data = write_data(tmp_path, [event("u", None, []), event("u", 1.0, None, ["i1"], None)])
    found = describe(data)
    assert found["counts"]["events_without_time"] == 1 and found["counts"]["clicks"] == 0
    assert "valid_start" not in found["cutoffs"]

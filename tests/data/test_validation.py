"""Bad rows are quarantined with their reason; bad columns stop the job."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from karma_ray.data.catalog import usable_items
from karma_ray.data.schema import ITEMS, check_columns
from karma_ray.data.validation import (
    CLEAN_EVENTS,
    DUPLICATE_ITEM,
    NO_ITEM_ID,
    NO_TIME,
    NO_TITLE,
    NO_USER,
    NULL_ENTRY,
    UNKNOWN_CLICK,
    check_events,
    check_items,
    check_share,
    count_reasons,
    event_columns,
    parse_times,
)
from karma_ray.errors import InputError, TooManyBadRows
from tests.data.logs import at, event, events_table, random_events

IDS = pa.array(["i1", "i2", "i3"])


def test_every_planted_bad_event_is_quarantined_once_with_its_reason() -> None:
    rows = [
        event("u1", 1, ["i1"], ["i1", "i2"]),
        event(None, 2, ["i1"]),
        event("  ", 3, ["i1"]),
        event("u1", None, ["i1"]),
        event("u1", 5, ["i1", None], ["i1", None]),
        event("u1", 6, ["gone", "i2"], ["gone", "i2", "i3"]),
        event("u1", 7, ["gone"]),
        event("u1", 8, [], ["i1"]),
        event("u1", 9, None),
    ]
    checked = check_events(events_table(rows), IDS, "log.parquet", first_row=100, order=1000)
    assert count_reasons(checked.quarantine) == {
        NO_USER: 2, UNKNOWN_CLICK: 2, NO_TIME: 1, NULL_ENTRY: 1,
    }  # fmt: skip
    assert checked.quarantine["row"].to_pylist() == [101, 102, 103, 104, 105, 106]
    assert set(checked.quarantine["source_file"].to_pylist()) == {"log.parquet"}
    assert json.loads(checked.quarantine["record"][4].as_py())["clicked_item_ids"] == ["gone", "i2"]
    assert checked.table.schema == CLEAN_EVENTS
    assert checked.table["clicked_item_ids"].to_pylist() == [["i1"], ["i1"], ["i2"]]
    assert checked.table["exposed_item_ids"].to_pylist() == [["i1", "i2"], ["i1"], ["i2", "i3"]]
    assert checked.table["order"].to_pylist() == [1000, 1004, 1005]


def test_pages_without_clicks_are_counted_and_no_fault() -> None:
    rows = [event("u1", 1, []), event("u1", 2, None), event("u1", 3, ["i1"], ["i1", "gone"])]
    checked = check_events(events_table(rows), IDS)
    assert checked.quarantine.num_rows == 0
    assert checked.counts["pages_without_clicks"] == 2
    assert checked.counts["exposures_not_in_catalogue"] == 1


def test_string_times_are_parsed_row_by_row() -> None:
    table = events_table([event("u1", 1, ["i1"]) for _ in range(6)])
    texts = [
        "2024-01-01T05:00:00Z", "2024-01-01 05:00:00", "2024-01-01T06:00:00.000+01:00",
        "2024-01-01", "yesterday", None,
    ]  # fmt: skip
    table = table.set_column(1, "timestamp", pa.array(texts))
    checked = check_events(table, IDS)
    assert checked.table["timestamp"].to_pylist() == [at(5), at(5), at(5), at(0)]
    assert count_reasons(checked.quarantine) == {NO_TIME: 2}


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_without_a_zone_are_utc(unit: str) -> None:
    naive = pa.chunked_array([pa.array([at(5).replace(tzinfo=None)], pa.timestamp(unit))])
    assert parse_times(naive, "events").to_pylist() == [at(5)]
    dates = pa.chunked_array([pa.array([at(0).date()])])
    assert parse_times(dates, "events").to_pylist() == [at(0)]


def test_wrong_columns_stop_the_job_and_are_named() -> None:
    table = events_table([event("u1", 1, ["i1"])])
    with pytest.raises(InputError, match=r"timestamp.*int64.*ISO 8601"):
        event_columns(table.set_column(1, "timestamp", pa.array([1_700_000_000])), "events")
    with pytest.raises(InputError, match=r"user_id.*missing"):
        event_columns(table.drop_columns(["user_id"]), "events")
    with pytest.raises(InputError, match="clicked_item_ids"):
        event_columns(table.set_column(4, "clicked_item_ids", pa.array(["i1"])), "events")


def test_chunks_and_slices_of_a_table_are_checked_alike() -> None:
    rows = [event(f"u{n}", n, ["i1", "x", "i2"], [None, "i3"]) for n in range(6)]
    whole = events_table(rows)
    pieces = pa.concat_tables([whole.slice(0, 1), whole.slice(1, 4), whole.slice(5)])
    assert check_events(pieces, IDS).table.equals(check_events(whole, IDS).table)
    part = check_events(whole.slice(2, 2), IDS, order=2).table
    assert part.equals(check_events(whole, IDS).table.slice(2, 2))


def test_how_many_other_items_there_are_changes_nothing() -> None:
    rows = [event("u1", 1, ["i1", "gone", None], ["i2"]), event("u1", 2, ["i3"], [None, "i3"])]
    events = pa.concat_tables([random_events(seed=3), events_table(rows)])
    few = pa.array([f"i{n}" for n in range(50)])
    many = pa.concat_arrays([pa.array([f"other {n}" for n in range(10_000)]), few])
    one, other = (check_events(events, ids) for ids in (few, many))
    assert one.counts == other.counts and one.counts["exposures_not_in_catalogue"] > 0
    assert one.table.equals(other.table) and one.quarantine.equals(other.quarantine)
    assert one.unknown_ids.equals(other.unknown_ids)


def test_every_planted_bad_item_is_quarantined_and_the_rest_is_the_catalogue() -> None:
    titles = [("a", "one"), (None, "two"), ("", "three"), ("b", None), ("b", " "), ("a", "again"),
              ("b", "four")]  # fmt: skip
    rows = [{"item_id": i, "title": t, "image": b"xyz"} for i, t in titles]
    table = pa.Table.from_pylist(rows, schema=ITEMS)
    checked = check_items(table)
    assert checked.table["item_id"].to_pylist() == ["a", "b"]
    assert checked.table["title"].to_pylist() == ["one", "four"]
    assert checked.table.equals(table.filter(pa.array(usable_items(table))))
    assert count_reasons(checked.quarantine) == {NO_ITEM_ID: 2, NO_TITLE: 2, DUPLICATE_ITEM: 1}
    assert "<3 bytes>" in checked.quarantine["record"][0].as_py()


def test_more_bad_rows_than_allowed_stop_the_job() -> None:
    check_share({NO_USER: 2}, 10, 0.2, "events")
    with pytest.raises(TooManyBadRows, match=r"events: 3 of 10 .*empty user_id: 2.*0\.2"):
        check_share({NO_USER: 2, NO_TIME: 1}, 10, 0.2, "events")


def test_floats_where_ids_belong_are_text_and_their_gaps_null() -> None:
    nan = float("nan")
    table = pa.table(
        {"user_id": [7.0, nan, 8.0], "timestamp": [at(1), at(2), at(3)],
         "clicked_item_ids": [[1.0], [1.0], [nan, 2.0]], "query": [nan, nan, nan]}
    )  # fmt: skip
    checked = check_events(table, pa.array(["1", "2"]))
    assert checked.table["user_id"].to_pylist() == ["7", "8"]
    assert checked.table["clicked_item_ids"].to_pylist() == [["1"], ["2"]]
    assert checked.table["query"].to_pylist() == [None, None]
    assert count_reasons(checked.quarantine) == {NO_USER: 1, NULL_ENTRY: 1}
    with pytest.raises(InputError, match=r"user_id: 1e\+18 is a rounded number"):
        check_events(table.set_column(0, "user_id", pa.array([1e18] * 3)), pa.array(["1"]))


def test_words_for_a_missing_id_are_no_id() -> None:
    rows = [event(user, 1, ["i1"]) for user in ("u", "nan", "NULL", "None", "\\N")]
    assert count_reasons(check_events(events_table(rows), IDS).quarantine) == {NO_USER: 4}
    items = pa.table({"item_id": ["nan", "NULL", "1"], "title": ["a", "b", "nan bread"]})
    checked = check_items(check_columns(items, ITEMS, "items"))
    assert checked.table["item_id"].to_pylist() == ["1"]
    assert count_reasons(checked.quarantine) == {NO_ITEM_ID: 2}


@pytest.mark.parametrize(
    "text", ["2024-01-01 01:00:00+00", "2024-01-01 01:00:00 UTC", "2024-01-01 03:00:00 +02"]
)
def test_a_zone_may_be_written_in_words_or_hours(text: str) -> None:
    assert parse_times(pa.chunked_array([[text]]), "log").to_pylist() == [at(1)]

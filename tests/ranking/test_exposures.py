"""Exposures: the history ends strictly before the page, and a page never sees its own clicks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from karma_ray.data.catalog import Catalog
from karma_ray.data.schema import EVENTS, ITEMS
from karma_ray.data.sessions import build_pages
from karma_ray.data.splits import Cutoffs
from karma_ray.data.validation import check_events
from karma_ray.ranking.collate import CtrCollator, newest_last
from karma_ray.ranking.config import RankingConfig
from karma_ray.ranking.exposures import build_exposures, counted
from karma_ray.ranking.vectors import Vectors, with_features
from karma_ray.retrieval.similarity import unit

START = datetime(2024, 1, 1, tzinfo=UTC)
CATALOG = Catalog(
    pa.Table.from_pylist(
        [{"item_id": f"i{n}", "title": f"thing {n}"} for n in range(10)], schema=ITEMS
    ).drop_columns(["image"])
)
DAY = 86_400_000_000
CUTOFFS = Cutoffs(*(int(START.timestamp()) * 1_000_000 + days * DAY for days in (4, 6)))


def page(day: float, shown: str, clicked: str, user: str = "u", **more: Any) -> dict[str, Any]:
    """A page of the items whose numbers `shown` lists as digits."""
    return {
        "user_id": user, "timestamp": START + timedelta(days=day), "query": "red thing",
        "exposed_item_ids": [f"i{n}" for n in shown],
        "clicked_item_ids": [f"i{n}" for n in clicked],
        **more,
    }  # fmt: skip


LOG = [
    page(0, "0123", "12"),
    page(1, "456", ""),
    page(2, "347", "7"),
    page(2, "589", "9", query="blue"),
    page(3, "0134", "4"),
    page(4, "0567", "5"),
    page(7, "1238", "8"),
    page(2.5, "12", "2", user="v"),
]


def built(
    log: list[dict[str, Any]], max_history: int = 3, held_out: np.ndarray | None = None
) -> dict[str, pa.Table]:
    events = pa.Table.from_pylist(log, schema=EVENTS)
    ids = CATALOG.table.column("item_id").combine_chunks()
    clean = check_events(events, ids, with_unclicked=True).table
    return build_exposures(build_pages(clean), CUTOFFS, CATALOG, max_history, held_out)


def of_user(table: pa.Table, user: str = "u") -> list[dict[str, Any]]:
    return [row for row in table.to_pylist() if row["user_id"] == user]


def test_a_history_is_the_newest_clicks_strictly_before_the_page_in_order() -> None:
    rows = of_user(built(LOG)["train"])
    assert [row["history_rows"] for row in rows] == [[], [1, 2], [1, 2], [1, 2], [2, 7, 9]]
    assert [row["query"] for row in rows][2:4] == ["red thing", "blue"]
    assert of_user(built(LOG)["test"])[0]["history_rows"] == [9, 4, 5]


def test_pages_without_clicks_are_exposures_too() -> None:
    tables = built(LOG)
    assert of_user(tables["train"])[1]["clicked"] == [False, False, False]
    assert counted(tables["train"]) == {"pages": 6, "candidates": 19, "clicks": 6}
    assert [len(tables[split]) for split in ("valid", "test")] == [1, 1]


def test_later_clicks_end_with_the_split() -> None:
    tables = built(LOG, max_history=9)
    assert of_user(tables["train"])[1]["later_rows"] == [7, 9, 4]
    assert of_user(tables["train"])[-1]["later_rows"] == []
    assert tables["valid"].column("later_rows").to_pylist() == [[]]


def test_later_clicks_are_of_the_sessions_that_the_log_names() -> None:
    log = [page(0, "1", "1"), *(page(day, "234", "34", session_id=f"{day > 2}") for day in (1, 3))]
    log += [page(2, "5", "5", session_id="False"), page(2, "67", "7", user="v")]
    (row, *_) = of_user(built(log, max_history=9)["train"])
    assert row["later_rows"] == [3, 4, 5, 3, 4]
    assert row["later_sessions"] == [1, 1, 1, 3, 3]


def test_pages_that_do_not_say_what_they_showed_are_left_out_but_remembered() -> None:
    log = [page(0, "", "3"), page(1, "12", "2")]
    assert built(log)["train"].to_pylist()[0]["history_rows"] == [3]
    assert len(built(log)["train"]) == 1


def test_a_click_that_was_not_listed_is_shown_and_a_purchase_without_click_is_left_out() -> None:
    (row,) = built([page(0, "123", "24", purchased_item_ids=["i3", "i4"])])["train"].to_pylist()
    assert row["candidate_rows"] == [1, 2, 4]
    assert row["clicked"] == [False, True, True]


def test_held_out_items_are_in_no_training_row() -> None:
    hidden = np.zeros(10, bool)
    hidden[[2, 4]] = True
    tables = built(LOG, held_out=hidden)
    rows = of_user(tables["train"])
    assert all({2, 4}.isdisjoint(row["candidate_rows"] + row["history_rows"]) for row in rows)
    assert tables["test"].to_pylist()[0]["history_rows"] == [9, 4, 5]


VECTORS = Vectors(
    unit(np.random.default_rng(0).normal(size=(10, 6)).astype(np.float32)), CATALOG.item_ids
)


def inputs(table: pa.Table, place: int) -> list[np.ndarray]:
    """Everything that a model reads of one page."""
    rows = with_features(table, VECTORS).slice(place, 1)
    batch = CtrCollator(RankingConfig(), num_features=13)(rows)
    names = ("history", "query", "request", "candidate", "features")
    return [tensor.numpy() for tensor in batch.named(names)]


def test_own_and_later_clicks_change_no_input_of_a_page() -> None:
    """The planted leak: other clicks on the page itself, at its time and afterwards."""
    other = [dict(row) for row in LOG]
    other[2]["clicked_item_ids"] = ["i3", "i4"]  # the page itself
    other[3]["clicked_item_ids"] = ["i5", "i8"]  # another page at the same time
    other[4]["clicked_item_ids"] = []  # the next pages
    other[5]["clicked_item_ids"] = ["i0", "i6"]
    mine, changed = built(LOG)["train"], built(other)["train"]
    place = [row["query"] == "red thing" and row["candidate_rows"] == [3, 4, 7]
             for row in mine.to_pylist()].index(True)  # fmt: skip
    assert mine["clicked"][place].as_py() != changed["clicked"][place].as_py()
    for before, after in zip(inputs(mine, place), inputs(changed, place), strict=True):
        np.testing.assert_array_equal(before, after)
    later = [not np.array_equal(*pair) for pair in
             zip(inputs(mine, place + 3), inputs(changed, place + 3), strict=True)]  # fmt: skip
    assert any(later), "the test would see a change if there were one"


def test_features_are_those_of_the_page_that_they_stand_beside() -> None:
    table = with_features(built(LOG)["train"], VECTORS)
    for row in table.to_pylist():
        found = np.array(row["features"], np.float32).reshape(len(row["candidate_rows"]), 13)
        cosines = VECTORS.items[row["candidate_rows"]] @ VECTORS.items[row["history_rows"]].T
        if not row["history_rows"]:
            assert not found.any()
            continue
        np.testing.assert_allclose(found[:, 10], cosines.max(1), rtol=1e-5)
        np.testing.assert_allclose(np.expm1(found[:, :10]).sum(1), cosines.shape[1], rtol=1e-5)


def test_lists_are_padded_in_front_and_cut_to_the_newest() -> None:
    column = pa.chunked_array([pa.array([[1, 2, 3], [], [4]], pa.list_(pa.int32()))])
    assert newest_last(column, None).tolist() == [[1, 2, 3], [-1, -1, -1], [-1, -1, 4]]
    assert newest_last(column, 2).tolist() == [[2, 3], [-1, -1], [-1, 4]]

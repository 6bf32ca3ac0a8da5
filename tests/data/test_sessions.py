"""Windows, histories and negatives: what each may hold, on logs with every awkward case."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from karma_ray.data.config import PrepareConfig
from karma_ray.data.preparation import Prepared, prepare_tables
from karma_ray.data.schema import EXAMPLES, SEQUENCES
from karma_ray.errors import InputError
from tests.data.logs import at, event, events_table, items_table, random_events

CONFIG = PrepareConfig(max_history=6, num_hard_negatives=3)


def prepared(rows: list[dict[str, Any]], **planned: Any) -> Prepared:
    """Rows by hand, everything before hour 100 trains and everything from 200 on tests."""
    manifest = {"valid_start": at(100).isoformat(), "test_start": at(200).isoformat(), **planned}
    return prepare_tables(events_table(rows), items_table(40), CONFIG, manifest)


def clicks_of(events: pa.Table) -> Counter[tuple[str, Any, Any, Any, str]]:
    """Each distinct (user, time, query, session, item) click once, by a plain loop."""
    seen = {
        (row["user_id"], row["timestamp"], row["query"], row["session_id"], item)
        for row in events.to_pylist()
        for item in row["clicked_item_ids"]
    }
    return Counter((user, time, item) for user, time, _, _, item in seen)


@pytest.mark.parametrize("max_history", [1, 2, 5, 20, 1000])
def test_each_click_is_trained_or_evaluated_exactly_once(max_history: int) -> None:
    events = random_events(seed=1)
    config = PrepareConfig(max_history=max_history)
    result = prepare_tables(events, items_table(60), config)
    entered: Counter[tuple[str, Any, str]] = Counter()
    for window in result.sequences.to_pylist():
        assert len(window["item_ids"]) <= max_history + 1
        steps = zip(window["timestamps"], window["item_ids"], window["loss_mask"], strict=True)
        entered.update((window["user_id"], time, item) for time, item, loss in steps if loss)
    for table in result.examples.values():
        rows = table.select(["user_id", "timestamp", "positive_item_id"]).to_pylist()
        entered.update(tuple(row.values()) for row in rows)
    assert entered == clicks_of(events)


def test_a_window_ends_with_a_step_that_has_a_full_history() -> None:
    result = prepared([event("u", n, [f"i{n}"]) for n in range(7)] + [event("u", 250, ["i0"])])
    (window,) = result.sequences.to_pylist()
    assert len(window["item_ids"]) == CONFIG.max_history + 1
    (example,) = result.examples["test"].to_pylist()
    assert len(example["history_item_ids"]) == CONFIG.max_history


def test_long_windows_give_every_later_click_half_a_window_of_context() -> None:
    result = prepared([event("u", n, [f"i{n}"]) for n in range(20)] + [event("u", 150, ["i0"])])
    windows = result.sequences.to_pylist()
    assert [w["item_ids"][0] for w in windows] == ["i0", "i3", "i6", "i9", "i12", "i13"]
    assert [sum(w["loss_mask"]) for w in windows] == [7, 3, 3, 3, 3, 1]
    for window in windows[1:]:
        assert window["loss_mask"].index(True) >= CONFIG.max_history // 2
        assert window["loss_mask"] == sorted(window["loss_mask"])


def test_histories_hold_the_last_strictly_earlier_clicks_as_brute_force_finds_them() -> None:
    events = random_events(seed=2)
    result = prepare_tables(events, items_table(60), CONFIG)
    order = clicks_of(events)
    for table in result.examples.values():
        assert table.schema == EXAMPLES
        for row in table.to_pylist():
            before = [
                time
                for (user, time, _), count in order.items()
                for _ in range(count)
                if user == row["user_id"] and time < row["timestamp"]
            ]
            assert row["history_timestamps"] == sorted(before)[-CONFIG.max_history :]
            for time, item in zip(row["history_timestamps"], row["history_item_ids"], strict=True):
                assert (row["user_id"], time, item) in order


def test_page_siblings_and_tied_pages_are_not_in_the_history() -> None:
    rows = [
        event("u", 1, ["i1"]),
        event("u", 150, ["i2", "i3"], ["i2", "i3", "i4"], query="a"),
        event("u", 150, ["i5"], query="b"),
        event("u", 151, ["i6"]),
    ]
    examples = prepared(rows).examples["valid"].to_pylist()
    history = {row["positive_item_id"]: row["history_item_ids"] for row in examples}
    assert history["i2"] == history["i3"] == history["i5"] == ["i1"]
    assert history["i6"] == ["i1", "i2", "i3", "i5"]  # clicks of the evaluated days count, too
    positives = {row["positive_item_id"]: row["page_positive_ids"] for row in examples}
    assert positives["i2"] == positives["i3"] == ["i2", "i3"]
    assert positives["i5"] == ["i5"]


def test_hard_negatives_were_shown_and_never_clicked_in_the_session() -> None:
    rows = [
        event("u", 1, ["i1"], ["i1", "i2", "i3", "i4", "i5"], session="s", purchased=["i5"]),
        event("u", 2, ["i2"], ["i2", "i4"], session="s"),
        event("u", 3, ["i3"], ["i3", "i4"], session="t"),
        event("v", 3, ["i3"], ["i3", "i4", "i1"], session="s"),
        event("u", 150, ["i4"], ["i4", *(f"i{n}" for n in range(10, 30))], session="s"),
        event("u", 151, ["i10"], ["i10"], session="s"),
    ]
    result = prepared(rows)
    negatives = {
        (row["user_id"], item): ids
        for row in result.sequences.to_pylist()
        for item, ids in zip(row["item_ids"], row["hard_negative_ids"], strict=True)
    }
    # i4 is clicked in the same session, but after the split: training cannot know.
    assert negatives == {
        ("u", "i1"): ["i3", "i4"], ("u", "i2"): ["i4"], ("u", "i3"): ["i4"],
        ("v", "i3"): ["i4", "i1"],
    }  # fmt: skip
    first = result.examples["valid"].to_pylist()[0]
    assert first["hard_negative_ids"] == [f"i{n}" for n in range(10, 30)]  # all: gAUC needs them


def test_kept_hard_negatives_depend_on_the_seed_and_on_nothing_else() -> None:
    rows = [event("u", n, ["i0"], [f"i{k}" for k in range(20)]) for n in range(30)]
    rows.append(event("u", 150, ["i1"]))
    kept = []
    for seed, some in [(0, rows), (0, [event("w", 5, ["i2"]), *reversed(rows)]), (1, rows)]:
        config = PrepareConfig(max_history=40, num_hard_negatives=3, seed=seed)
        table = prepare_tables(
            events_table(some), items_table(40), config, {**PLAN, "valid_start": str(at(100))}
        ).sequences
        row = next(row for row in table.to_pylist() if row["user_id"] == "u")
        kept.append(dict(zip(row["page_ids"], row["hard_negative_ids"], strict=True)))
    assert all(len(ids) == 3 for ids in kept[0].values())
    assert kept[0] == kept[1] != kept[2]
    chosen = Counter(item for ids in kept[0].values() for item in ids)
    assert len(chosen) > 12  # another choice on every page


def test_a_row_delivered_twice_changes_nothing() -> None:
    once = random_events(seed=3)
    generator = np.random.default_rng(0)
    again = once.take(pa.array(generator.choice(once.num_rows, 50)))
    first = prepare_tables(once, items_table(60), CONFIG, PLAN)
    second = prepare_tables(pa.concat_tables([once, again]), items_table(60), CONFIG, PLAN)
    assert first.sequences.equals(second.sequences)
    assert first.examples["test"].equals(second.examples["test"])


def test_page_ids_do_not_depend_on_the_order_of_the_input() -> None:
    events = random_events(seed=4)
    shuffled = events.take(pa.array(np.random.default_rng(0).permutation(events.num_rows)))
    ids = [
        Counter(
            (row["page_id"], row["query"], row["positive_item_id"])
            for row in prepare_tables(table, items_table(60), CONFIG, PLAN)
            .examples["test"]
            .to_pylist()
        )
        for table in (events, shuffled)
    ]
    assert ids[0] == ids[1]


def test_no_training_row_changes_with_what_happens_later() -> None:
    events = random_events(seed=5)
    changed = [
        {**row, "clicked_item_ids": row["exposed_item_ids"], "session_id": "s0"}
        if row["timestamp"] >= at(150)
        else row
        for row in events.to_pylist()
    ]
    first = prepare_tables(events, items_table(60), CONFIG, PLAN)
    second = prepare_tables(events_table(changed), items_table(60), CONFIG, PLAN)
    assert first.sequences.schema == SEQUENCES
    assert first.sequences.equals(second.sequences)


def test_counts_add_up() -> None:
    counts = prepare_tables(random_events(seed=6), items_table(60), CONFIG).facts["counts"]
    evaluated = counts["valid_examples"] + counts["test_examples"]
    assert counts["training_clicks"] + evaluated == counts["clicks"]
    assert (
        counts["pages"] + counts["repeated_pages"] + counts["pages_without_clicks"]
        == (counts["event_rows"])
    )


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match=r"prepare\.max_history: 0"):
        prepare_tables(random_events(seed=1), items_table(60), PrepareConfig(max_history=0))


PLAN = {"valid_start": at(150).isoformat(), "test_start": at(175).isoformat()}

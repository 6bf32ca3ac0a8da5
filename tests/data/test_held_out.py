"""Held-out categories: chosen by name, absent from all training, untouched in the examples."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from karma_ray.artifacts import write_json, write_table
from karma_ray.data.held_out import held_out_categories, leaf
from karma_ray.data.preparation import Prepared, prepare_tables
from karma_ray.data.prepared import PreparedData, differences
from karma_ray.data.schema import ITEMS
from karma_ray.data.sessions import PrepareConfig
from karma_ray.errors import InputError
from karma_ray.runs.preparation import ensure_prepared, prepare
from tests.data.logs import at, event, events_table, random_events

CONFIG = PrepareConfig(max_history=6, num_hard_negatives=3, hold_out=0.2)
NAMES = [f"kind {n}" for n in range(10)]


def items(num: int = 60) -> pa.Table:
    rows = [
        {"item_id": f"i{n}", "title": f"thing {n}", "category": f"part {n % 3} > {NAMES[n % 10]}"}
        for n in range(num)
    ]
    return pa.Table.from_pylist([*rows[:-1], {**rows[-1], "category": None}], schema=ITEMS)


def held_ids(table: pa.Table, config: PrepareConfig = CONFIG) -> set[str]:
    chosen = held_out_categories(NAMES, config.hold_out, config.seed)
    return {row["item_id"] for row in table.to_pylist() if leaf(row["category"]) in chosen}


def trained_on(prepared: Prepared) -> set[str]:
    clicks = pc.list_flatten(prepared.sequences["item_ids"].combine_chunks())
    pages = pc.list_flatten(prepared.sequences["hard_negative_ids"].combine_chunks())
    return {*clicks.to_pylist(), *pc.list_flatten(pages).to_pylist()}


def test_the_unit_is_the_last_part_of_the_path() -> None:
    paths = ["Women > Jersey > Vest top", "Men > Knit > vest top", "Vest top", None, ""]
    assert [leaf(path) for path in paths] == ["vest top", "vest top", "vest top", "", ""]


def test_the_choice_depends_on_names_and_seed_alone() -> None:
    chosen = held_out_categories(NAMES, 0.2, 0)
    assert len(chosen) == 2 and chosen < set(NAMES)
    assert held_out_categories([*reversed(NAMES), *NAMES, None], 0.2, 0) == chosen
    assert len({frozenset(held_out_categories(NAMES, 0.2, seed)) for seed in range(5)}) > 1
    assert held_out_categories(NAMES, 0.0, 0) == set()
    assert len(held_out_categories(NAMES, 0.01, 0)) == 1
    with pytest.raises(InputError, match=r"prepare\.hold_out: 0\.9 leaves no category"):
        held_out_categories(["one", None], 0.9, 0)


def test_held_out_items_are_nowhere_in_training_and_in_all_examples() -> None:
    events = random_events(seed=3)
    whole = prepare_tables(events, items(), PrepareConfig(max_history=6, num_hard_negatives=3))
    held = prepare_tables(events, items(), CONFIG)
    gone = held_ids(items())
    assert gone and gone < trained_on(whole)
    assert trained_on(held) == trained_on(whole) - gone
    for split, table in whole.examples.items():
        assert held.examples[split].equals(table)
    assert held.facts["counts"]["held_out_items"] == len(gone)
    assert held.facts["counts"]["held_out_categories"] == 2
    assert held.facts["counts"]["training_clicks"] < whole.facts["counts"]["training_clicks"]


def test_other_clicks_close_the_gap_in_the_history_and_negatives_are_filled_up() -> None:
    gone = sorted(held_ids(items()))
    rest = [f"i{n}" for n in range(20) if f"i{n}" not in gone]
    shown = [gone[0], gone[1], *rest[5:9]]
    rows = [
        event("u", 1, [rest[0]]), event("u", 2, [gone[0], rest[1]], [*shown, rest[1]]),
        event("u", 3, [gone[1]]), event("u", 4, [rest[2]]), event("u", 250, [gone[0]]),
    ]  # fmt: skip
    manifest = {"valid_start": at(100).isoformat(), "test_start": at(200).isoformat()}
    result = prepare_tables(events_table(rows), items(), CONFIG, manifest)
    (window,) = result.sequences.to_pylist()
    assert window["item_ids"] == rest[:3] and window["loss_mask"] == [True] * 3
    assert len(window["hard_negative_ids"][1]) == 3
    (example,) = result.examples["test"].to_pylist()
    assert gone[0] in example["history_item_ids"] and example["positive_item_id"] == gone[0]


def test_a_folder_says_what_it_holds_out(tmp_path: Path) -> None:
    uri = str(tmp_path)
    write_table(random_events(seed=3), f"{uri}/events")
    write_table(items(), f"{uri}/items")
    prepare(uri, CONFIG)
    data = PreparedData.load(uri)
    catalog, in_memory = data.catalog(), prepare_tables(random_events(seed=3), items(), CONFIG)
    mask = data.held_out(catalog)
    assert mask is not None
    assert {catalog.item_ids[row] for row in mask.nonzero()[0]} == held_ids(items())
    assert data.facts["counts"] == in_memory.facts["counts"]
    windows = sorted(map(str, data.sequences().to_pylist()))
    assert windows == sorted(map(str, in_memory.sequences.to_pylist()))
    usual = ensure_prepared(uri, PrepareConfig(max_history=6, num_hard_negatives=3))
    assert usual.held_out(catalog) is None
    assert "held_out_items" not in usual.facts["counts"]


def test_data_prepared_before_the_setting_existed_stay_prepared() -> None:
    old = {"max_history": 6, "num_hard_negatives": 8, "valid_share": 0.1, "test_share": 0.1,
           "max_bad_share": 0.2, "num_partitions": 4, "seed": 0}  # fmt: skip
    assert differences({"prepare": old}, PrepareConfig(max_history=6)) == {}
    wanted = PrepareConfig(max_history=6, hold_out=0.1)
    assert differences({"prepare": old}, wanted) == {"hold_out": (0.0, 0.1)}


def test_data_that_came_split_cannot_hold_anything_out(tmp_path: Path) -> None:
    write_json({"presplit": True}, f"{tmp_path}/prepared.json")
    with pytest.raises(InputError, match=r"prepare\.hold_out: 0\.2 is not possible"):
        ensure_prepared(str(tmp_path), CONFIG)

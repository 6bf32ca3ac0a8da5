"""Prepared data as read back, whole tables in memory, and what a query matches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from karma_ray.artifacts import write_json, write_table
from karma_ray.baselines.popularity import CLICK_COLUMNS, training_clicks, warm_mask
from karma_ray.data import fragments, prepared
from karma_ray.data.catalog import Catalog
from karma_ray.data.config import PrepareConfig
from karma_ray.data.preparation import prepare_tables
from karma_ray.data.prepared import PreparedData, QueryMatches, differences, fingerprint, terms
from karma_ray.data.schema import EXAMPLES, ITEMS, QUERY_MATCHES, SEQUENCES
from karma_ray.errors import InputError, TooManyBadRows
from tests.data.logs import event, events_table, items_table, random_events


def catalog() -> Catalog:
    titles = ["Red Cotton Dress", "red wool-coat", "Blue DRESS", "红色连衣裙", "红色外套"]
    rows = [
        {"item_id": f"i{n}", "title": title, "brand": "Acme" if n < 3 else None}
        for n, title in enumerate(titles)
    ]
    return Catalog(pa.Table.from_pylist(rows, schema=ITEMS).drop_columns(["image"]))


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("red", [0, 1]),
        ("dress RED", [0]),
        ("acme, coat!", [1]),
        ("acme", [0, 1, 2]),
        ("连衣裙", [3]),
        ("红色", [3, 4]),
        ("red trousers", [0, 1, 2, 3, 4]),
        ("", [0, 1, 2, 3, 4]),
        ("!?", [0, 1, 2, 3, 4]),
        (None, [0, 1, 2, 3, 4]),
    ],
)
def test_a_query_matches_the_items_that_hold_all_its_terms(
    query: str | None, rows: list[int]
) -> None:
    assert QueryMatches(catalog()).rows(query).tolist() == rows


def test_the_truth_table_comes_before_the_words() -> None:
    truth = pa.table(
        {"query": ["red", "nothing", "red", None], "item_ids": [["i4"], ["?"], ["i3"], ["i1"]]},
        schema=QUERY_MATCHES,
    )
    matches = QueryMatches(catalog(), truth)
    assert matches.rows("red").tolist() == [3, 4]
    assert matches.rows("nothing").tolist() == [0, 1, 2, 3, 4]
    assert matches.rows("blue").tolist() == [2]  # not in the table: by its words
    assert matches.rows("red") is matches.rows("red")


def test_what_is_kept_of_queries_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "CACHED_ROWS", 3)
    matches = QueryMatches(catalog())
    for _ in range(2):
        assert [matches.rows(query).tolist() for query in ("red", "dress red", "acme")] == [
            [0, 1], [0], [0, 1, 2],
        ]  # fmt: skip
        assert sum(map(len, matches._cache.values())) <= 3


def test_terms_are_lower_case_words_and_digits() -> None:
    assert terms("T-Shirt, size_XL 42/44 Été") == {"t", "shirt", "size", "xl", "42", "44", "été"}


def test_tables_in_memory_give_facts_and_quarantine() -> None:
    bad = events_table([event(None, 1, ["i1"]), event("u1", 1, ["nowhere"])])
    events = pa.concat_tables([random_events(seed=8), bad])
    result = prepare_tables(events, items_table(60), PrepareConfig())
    assert result.sequences.schema == SEQUENCES
    assert {split: table.schema for split, table in result.examples.items()} == {
        "valid": EXAMPLES, "test": EXAMPLES,
    }  # fmt: skip
    assert sum(result.facts["quarantined"].values()) == result.quarantine.num_rows == 2
    assert result.facts["query_source"] == "real"
    assert result.facts["negative_source"] == "exposed"
    labels = {"query_source": "derived", "negative_source": "proxy"}
    labelled = prepare_tables(events, items_table(60), PrepareConfig(), labels).facts
    assert labels.items() <= labelled.items()


def test_bad_tables_stop() -> None:
    events = random_events(seed=8)
    with pytest.raises(InputError, match="the catalogue is empty"):
        prepare_tables(events, items_table(0), PrepareConfig())
    with pytest.raises(TooManyBadRows, match="click on an item not in the catalogue"):
        prepare_tables(events, items_table(1), PrepareConfig())
    with pytest.raises(InputError, match="nothing to prepare"):
        prepare_tables(events, items_table(1).slice(0, 1).set_column(
            0, "item_id", pa.array(["other"])), PrepareConfig(max_bad_share=1.0))  # fmt: skip


def write_data(folder: Path, config: PrepareConfig) -> str:
    result = prepare_tables(random_events(seed=9), items_table(60), config)
    write_table(items_table(60), f"{folder}/items")
    write_table(result.sequences, f"{folder}/sequences")
    for split, table in result.examples.items():
        write_table(table, f"{folder}/examples/split={split}")
    write_json(result.facts, f"{folder}/prepared.json")
    return str(folder)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    uri = write_data(tmp_path, PrepareConfig())
    data = PreparedData.load(uri)
    assert data.sequences().schema == SEQUENCES
    assert pa.concat_tables(data.windows()).equals(data.sequences().combine_chunks())
    assert data.first_windows(5).equals(data.sequences().slice(0, 5))
    assert data.examples("valid").schema == data.examples("test").schema == EXAMPLES
    assert data.examples("test").num_rows == data.facts["counts"]["test_examples"]
    assert data.query_matches(data.catalog()).rows("thing 7").tolist() == [7]
    with pytest.raises(InputError, match=r"split: 'train'.*valid, test"):
        data.examples("train")


def test_windows_are_streamed_in_order_and_counted_as_the_whole_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = PreparedData.load(write_data(tmp_path / "one", PrepareConfig())).sequences()
    for number, start in enumerate(range(0, whole.num_rows, 11)):
        write_table(whole.slice(start, 11), f"{tmp_path}/one/sequences", f"part-{number:03d}")
    (tmp_path / "one" / "sequences" / "part-00000.parquet").unlink()
    monkeypatch.setattr(fragments, "BLOCK_ROWS", 4)
    data = PreparedData.load(str(tmp_path / "one"))
    items = data.catalog()
    blocks = list(data.windows(*CLICK_COLUMNS))
    assert {tuple(block.column_names) for block in blocks} == {CLICK_COLUMNS}
    assert max(block.num_rows for block in blocks) == 4
    assert data.first_windows(14).equals(whole.slice(0, 14))
    for count in (training_clicks, warm_mask):
        np.testing.assert_array_equal(count(blocks, items), count(whole, items))


def test_what_was_shown_and_clicked_alike_is_no_page_with_negatives() -> None:
    rows = [event(f"u{n}", n, ["i1"], ["i1"]) for n in range(20)]
    facts = prepare_tables(events_table(rows), items_table(3), PrepareConfig()).facts
    assert facts["counts"]["pages_with_negatives"] == 0 and facts["negative_source"] == "none"
    rows += [event("v", 3, ["i1"], ["i2", "i1"])]
    facts = prepare_tables(events_table(rows), items_table(3), PrepareConfig()).facts
    assert facts["counts"]["pages_with_negatives"] == 1 and facts["negative_source"] == "exposed"


def test_data_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--data: .*nowhere' does not exist"):
        PreparedData.load(str(tmp_path / "nowhere"))
    (tmp_path / "my data").mkdir()
    command = r"is not prepared.*python jobs/prepare\.py --data '.*/my data'"
    with pytest.raises(InputError, match=command):
        PreparedData.load(str(tmp_path / "my data"))


def test_only_settings_that_change_rows_ask_for_a_new_preparation(tmp_path: Path) -> None:
    facts = PreparedData.load(write_data(tmp_path, PrepareConfig())).facts
    assert differences(facts, PrepareConfig(num_partitions=9)) == {}
    assert differences(facts, PrepareConfig(max_history=9)) == {"max_history": (20, 9)}


def test_the_fingerprint_follows_the_input_only(tmp_path: Path) -> None:
    uri = write_data(tmp_path, PrepareConfig())
    before = fingerprint(uri)
    write_json({}, f"{uri}/prepared.json")
    assert fingerprint(uri) == before
    write_table(items_table(61), f"{uri}/items")
    assert fingerprint(uri) != before

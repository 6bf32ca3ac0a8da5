"""The user's attribute history as a floor."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from karma_ray.baselines.affinity import AffinityRanker, attribute_columns
from karma_ray.data.catalog import Catalog
from karma_ray.data.prepared import QueryMatches

NO_CLICKS = np.zeros(8, dtype=np.int64)


def affinity(catalog, table, clicks=NO_CLICKS) -> dict[str, float]:
    scores = AffinityRanker(catalog, QueryMatches(catalog), clicks).score(table)
    return dict(zip(catalog.item_ids, scores[0].tolist(), strict=True))


def test_items_that_share_more_with_the_history_come_first(catalog, requests_table) -> None:
    score = affinity(catalog, requests_table([(None, ["c", "d"])]))  # blue shirts of bolt
    assert score["c"] == score["d"] == max(score.values())
    assert score["c"] > score["a"] and score["f"] > score["e"]


def test_the_query_comes_before_the_taste(catalog, requests_table) -> None:
    score = affinity(catalog, requests_table([("mug", ["c", "d"])]))
    assert score["f"] > score["e"] > score["c"]


def test_ties_go_by_popularity_and_only_ties(catalog, requests_table) -> None:
    clicks = NO_CLICKS.copy()
    clicks[[1, 3]] = [10, 3]
    score = affinity(catalog, requests_table([(None, [])]), clicks)
    assert score["b"] == max(score.values()) and score["d"] > score["a"]
    taste = affinity(catalog, requests_table([(None, ["c"] * 9)]), clicks)
    assert taste["c"] > taste["b"]


def test_a_user_without_history_gets_what_everybody_gets(catalog, requests_table) -> None:
    score = affinity(catalog, requests_table([("mug", ["unknown item"])]))
    assert score["e"] == score["f"] == score["g"] > score["a"] == score["h"]


def test_a_rarer_shared_value_says_more(catalog, requests_table) -> None:
    table = catalog.table.set_column(
        5, "colour", pa.array(["x", "x", "x", "x", "x", "x", "y", "y"])
    )
    table = table.select(["item_id", "title", "text", "colour"])
    bare = Catalog(table.append_column("brand", pa.nulls(8, pa.string())).append_column(
        "category", pa.nulls(8, pa.string())
    ))  # fmt: skip
    score = affinity(bare, requests_table([(None, ["a", "g"])]))
    assert score["h"] > score["b"]


def test_attribute_columns_are_the_declared_ones_or_the_small_ones(catalog) -> None:
    assert attribute_columns(catalog.table) == ["brand", "category", "colour"]
    declared = catalog.table.append_column("attr_style", pa.array(["s", "t"] * 4))
    assert attribute_columns(declared) == ["attr_style"]
    constant = catalog.table.append_column("source", pa.array(["shop"] * 8))
    assert "source" not in attribute_columns(constant)


def test_the_order_of_the_catalogue_changes_nothing(catalog, shuffled, requests_table) -> None:
    other, order = shuffled
    table, clicks = requests_table([("red", ["b", "g", "f"])]), np.arange(8)
    plain = AffinityRanker(catalog, QueryMatches(catalog), clicks).score(table)
    moved = AffinityRanker(other, QueryMatches(other), clicks[order]).score(table)
    assert (moved == plain[:, order]).all()

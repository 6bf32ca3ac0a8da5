"""The channels: the floors' lists from stored arrays, whatever is asked."""

from __future__ import annotations

import numpy as np
import pytest

from karma_ray.artifacts import read_manifest
from karma_ray.baselines.floors import build_floor
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError, SkewError
from karma_ray.retrieval.channel_words import FEW_TERMS, Words
from karma_ray.retrieval.channels import Channels, top_rows
from tests.retrieval.channel_run import write_data

FLOORS = {"bm25": "bm25", "affinity": "affinity", "popularity": "query_filter_popular"}
K = 15


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PreparedData:
    return PreparedData.load(write_data(tmp_path_factory.mktemp("channels"), num_valid=40))


@pytest.fixture(scope="module")
def channels(data: PreparedData) -> Channels:
    return Channels.of(data, data.catalog().item_ids, {"index": "this"})


@pytest.mark.parametrize("name", FLOORS)
def test_a_channel_gives_the_list_of_its_floor(name, data, channels) -> None:
    catalog, examples = data.catalog(), data.examples("valid")
    queries = [*examples.column("query").to_pylist()[:-3], None, "red mug", "zzz nothing"]
    examples = examples.set_column(examples.column_names.index("query"), "query", [queries])
    scores = build_floor(FLOORS[name], data).score(examples)
    histories = examples.column("history_item_ids").to_pylist()
    for query, history, wanted in zip(queries, histories, scores, strict=True):
        found = channels.lists(channels.asked(query, catalog.rows(history or [])), k=K)[name]
        best = np.lexsort((np.arange(len(wanted)), -wanted))[:K]
        if name == "bm25":
            best = best[wanted[best] > 0]
        # Items whose scores are equal but for rounding may change places.
        np.testing.assert_allclose(wanted[found], wanted[best], rtol=1e-5, atol=1.0)
        assert len(set(found)) == len(found) == len(best)
        clear = np.abs(np.diff(wanted[best])) > (1e-5 if name == "bm25" else 0)
        if clear.all():
            assert found.tolist() == best.tolist()


def test_what_is_saved_gives_the_same_lists(data, channels, tmp_path) -> None:
    channels.save(str(tmp_path / "channels"), {})
    loaded = Channels.load(str(tmp_path / "channels"), "this")
    for query, history in (("red mug", [3, 3, 8]), (None, []), ("shirt", [1]), ("zzz", [39])):
        rows = np.array(history, np.int64)
        before, after = (c.lists(c.asked(query, rows), k=K) for c in (channels, loaded))
        assert {name: rows.tolist() for name, rows in before.items()} == {
            name: rows.tolist() for name, rows in after.items()
        }


@pytest.mark.parametrize("num_terms", (1, FEW_TERMS, FEW_TERMS + 1, 12, 30))
def test_bm25_is_the_sum_of_the_lists_of_all_terms_but_for_rounding(num_terms) -> None:
    rng = np.random.default_rng(num_terms)
    texts = [" ".join(f"w{word}" for word in rng.zipf(1.5, 12) % 40) for _ in range(200)]
    words = Words.of(texts)
    assert len(words.numbers) > 30
    for numbers in (np.arange(num_terms), np.sort(rng.permutation(len(words.numbers))[:num_terms])):
        shares = rng.random(num_terms).astype(np.float32)
        wanted = np.zeros(200)
        for number, share in zip(numbers, shares, strict=True):
            for place in range(words.ends[number], words.ends[number + 1]):
                wanted[words.items[place]] += float(words.impact[place]) * share
        np.testing.assert_allclose(words.scores((numbers, shares)), wanted, rtol=1e-6)


def test_channels_of_another_index_are_refused(channels, tmp_path) -> None:
    channels.save(str(tmp_path / "channels"), {})
    with pytest.raises(SkewError, match="made from index this"):
        Channels.load(str(tmp_path / "channels"), "another")
    (tmp_path / "channels" / "words-items.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match="is damaged"):
        Channels.load(str(tmp_path / "channels"), "this")
    assert read_manifest(str(tmp_path / "channels"))["num_items"] == 40


def test_data_without_an_item_of_the_index_are_refused(data) -> None:
    with pytest.raises(InputError, match="lacks items of the index, such as i40"):
        Channels.of(data, [*data.catalog().item_ids, "i40"])


def test_the_order_of_the_index_is_that_of_the_channels(data, channels) -> None:
    ids = data.catalog().item_ids
    turned = Channels.of(data, ids[::-1])
    rows = np.array([3, 8], np.int64)
    ours = channels.lists(channels.asked("red mug", rows), k=K)["bm25"]
    theirs = turned.lists(turned.asked("red mug", 39 - rows), k=K)["bm25"]
    before = channels.asked("red mug", rows).by_query[ours]
    after = turned.asked("red mug", 39 - rows).by_query[theirs]
    np.testing.assert_allclose(before, after, rtol=1e-5)


def test_only_allowed_items_are_listed(channels) -> None:
    allowed = np.zeros(40, bool)
    allowed[[2, 5, 6, 30]] = True
    for query, history in (("red mug", [3, 8]), (None, []), ("shirt", [1])):
        asked = channels.asked(query, np.array(history, np.int64))
        for name, rows in channels.lists(asked, allowed).items():
            assert set(rows) <= {2, 5, 6, 30}, name
            assert name == "bm25" or len(rows) == 4


@pytest.mark.parametrize("num_values", (3, 1000))
@pytest.mark.parametrize("k", (1, 7, 60))
def test_the_best_are_in_the_order_of_value_then_place(num_values, k) -> None:
    values = np.random.default_rng(k).integers(0, num_values, 30_000).astype(np.float32)
    wanted = np.lexsort((np.arange(len(values)), -values))[:k]
    assert top_rows(values, k).tolist() == wanted.tolist()
    assert top_rows(values[:5], 60).tolist() == np.argsort(-values[:5], kind="stable").tolist()

"""Encoding the catalogue does not depend on batches; the table joins by id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from karma_ray.artifacts import read_table
from karma_ray.errors import InputError, KarmaRayError, SkewError
from karma_ray.retrieval.encode import (
    GPU_SLOTS,
    ItemTable,
    encode_catalog,
    item_batches,
    load_embeddings,
    save_embeddings,
)
from tests import tiny_run


@pytest.fixture(scope="module")
def encoded():
    words, items = tiny_run.tokenizer(), tiny_run.catalog()
    model = tiny_run.interest_model(words)
    tokens, lengths = tiny_run.item_tokens(words, items)
    return model, tokens, lengths, encode_catalog(model, tokens, lengths)


def test_batch_size_and_item_order_change_nothing_beyond_rounding(encoded) -> None:
    model, tokens, lengths, whole = encoded
    order = np.random.default_rng(0).permutation(len(lengths))
    small = encode_catalog(model, tokens[order], lengths[order], batch_size=3)
    np.testing.assert_allclose(small, whole[order], atol=1e-5)


def test_a_gpu_encodes_as_many_items_at_once_as_its_slots_hold() -> None:
    lengths = np.sort(np.random.default_rng(0).integers(0, 90, 5000))
    lengths[-1] = GPU_SLOTS + 1  # encoded alone
    order = np.arange(len(lengths))
    parts = list(item_batches(order, lengths, torch.device("cuda"), None))
    assert np.array_equal(np.concatenate(parts), order) and len(parts) < 12
    assert all(len(p) * lengths[p].max() <= GPU_SLOTS for p in parts[:-1]) and len(parts[-1]) == 1
    sizes = [len(p) for p in item_batches(order, lengths, torch.device("cpu"), None)]
    assert set(sizes[:-1]) == {256}


def test_the_result_is_the_encoder_item_by_item(encoded) -> None:
    model, tokens, lengths, whole = encoded
    for row in (0, 1, 17):
        one = torch.from_numpy(tokens[row : row + 1, : lengths[row]].astype(np.int64))
        with torch.no_grad():
            expected = model.encode_items(one, torch.tensor([int(lengths[row])]))[0]
        np.testing.assert_allclose(whole[row], expected.numpy(), atol=1e-5)


def test_encoding_leaves_the_mode_of_a_model_in_training(encoded) -> None:
    model, tokens, lengths, _ = encoded
    model.train()
    encode_catalog(model, tokens[:2], lengths[:2])
    assert model.training
    model.eval()


def test_bfloat16_stays_close_and_comes_back_as_float32(encoded) -> None:
    model, tokens, lengths, whole = encoded
    half = encode_catalog(model, tokens, lengths, precision="bfloat16")
    assert half.dtype == np.float32 and not np.array_equal(half, whole)
    cosine = (half * whole).sum(1) / np.linalg.norm(half, axis=1) / np.linalg.norm(whole, axis=1)
    assert cosine.min() > 0.99


def table(width: int = 4) -> ItemTable:
    vectors = np.random.default_rng(0).normal(size=(3, width)).astype(np.float32)
    return ItemTable(["a", "b", "c"], ["A", "B", "C"], vectors, {"bundle": "b1"})


def test_saved_embeddings_come_back_bitwise_with_the_documented_columns(tmp_path) -> None:
    before = table()
    save_embeddings(before, str(tmp_path))
    after = load_embeddings(str(tmp_path), bundle_hash="b1")
    assert np.array_equal(after.embeddings, before.embeddings)
    assert (after.item_ids, after.titles) == (before.item_ids, before.titles)
    schema = read_table(str(tmp_path)).schema
    assert str(schema.field("item_id").type) == "string"
    assert str(schema.field("embedding").type).startswith("fixed_size_list<")
    assert str(schema.field("embedding").type).endswith("float>[4]")


def test_embeddings_of_another_bundle_are_refused(tmp_path) -> None:
    save_embeddings(table(), str(tmp_path))
    with pytest.raises(SkewError, match="b1"):
        load_embeddings(str(tmp_path), bundle_hash="b2")


def test_unfinished_embeddings_are_refused(tmp_path) -> None:
    save_embeddings(table(), str(tmp_path))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match="manifest"):
        load_embeddings(str(tmp_path))


def test_reordering_joins_by_id_and_names_what_is_missing() -> None:
    moved = table().in_order(["c", "a", "b"])
    assert np.array_equal(moved.embeddings, table().embeddings[[2, 0, 1]])
    assert moved.titles == ["C", "A", "B"] and moved.rows(["a", "x"]).tolist() == [1, -1]
    with pytest.raises(SkewError, match="'d'"):
        table().in_order(["a", "b", "d"])
    with pytest.raises(SkewError, match="hold 3 items, 2"):
        table().in_order(["a", "b"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_are_refused_by_the_items_id(tmp_path, value) -> None:
    embeddings = np.ones((3, 4), np.float32)
    embeddings[1, 2] = value
    table = ItemTable(["a", "b", "c"], ["A", "B", "C"], embeddings, {})
    with pytest.raises(KarmaRayError, match=r"1 of 3 items are not finite \(for example of 'b'\)"):
        save_embeddings(table, str(tmp_path))


def test_mapped_embeddings_are_those_that_are_read_and_follow_the_files(tmp_path: Path) -> None:
    folder = str(tmp_path / "embeddings")
    for width in (4, 6):  # the second replaces the first
        save_embeddings(table(width), folder)
        read, mapped = load_embeddings(folder), load_embeddings(folder, mapped=True)
        assert np.array_equal(mapped.embeddings, read.embeddings)
        assert (mapped.item_ids, mapped.titles) == (read.item_ids, read.titles)
        mapped.embeddings[:] = 0  # of this process alone
        again = load_embeddings(folder, mapped=True).embeddings
        assert np.array_equal(again, read.embeddings)

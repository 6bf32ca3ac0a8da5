"""What is trained is what serves: h of a request is h of the same step in a training window."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from karma_ray.data.collate import Batch, Collator
from karma_ray.model.interest import InterestModel
from tests import tiny
from tests.model.conftest import Build

every_variant = pytest.mark.parametrize(("layout", "query_mode"), tiny.VARIANTS)


@torch.no_grad()
def _table(model: InterestModel) -> Tensor:
    """e [I, D] of the whole catalogue."""
    tokens, lengths = (torch.from_numpy(array.astype(np.int64)) for array in tiny.item_tokens())
    return model.encode_items(tokens, lengths)


@torch.no_grad()
def _h(model: InterestModel, batch: Batch, table: Tensor) -> Tensor:
    return model.interest(batch, table[batch.item_rows])


@torch.no_grad()
def _asked(model: InterestModel, rows: list[dict], table: Tensor) -> Tensor:
    batch = tiny.collator().requests(tiny.examples(*rows))
    return model.last_interest(batch, table[batch.item_rows])


@every_variant
def test_a_request_gives_the_h_of_its_step_in_training(
    build: Build, layout: str, query_mode: str
) -> None:
    """Train/serve equality: strictly earlier clicks are the context of every step of a page."""
    _assert_served_as_trained(build(layout, query_mode).interest)


def test_so_it_does_where_items_hold_words() -> None:
    with_words = tiny.model(lexical=6).interest.eval()
    with_words.item_encoder.words.fit(*tiny.item_tokens())
    _assert_served_as_trained(with_words)


def _assert_served_as_trained(model: InterestModel) -> None:
    shop = tiny.shop()
    table = _table(model)
    trained = _h(model, tiny.batch(shop), table)
    rows, wanted = [], []
    for b, row in enumerate(shop.to_pylist()):
        for k, now in enumerate(row["timestamps"]):
            past = [t for t, then in enumerate(row["timestamps"]) if then < now]
            rows.append(
                {
                    "query": row["queries"][k],
                    "history_item_ids": [row["item_ids"][t] for t in past],
                    "history_queries": [row["queries"][t] for t in past],
                    "history_timestamps": [row["timestamps"][t] for t in past],
                }
            )
            wanted.append(trained[b, k])
    torch.testing.assert_close(
        _asked(model, rows, table), torch.stack(wanted), atol=1e-5, rtol=1e-5
    )


@every_variant
def test_padding_and_batch_order_change_nothing(build: Build, layout: str, query_mode: str) -> None:
    model, shop = build(layout, query_mode).interest, tiny.shop()
    table = _table(model)
    whole = _h(model, tiny.batch(shop), table)
    back = _h(model, tiny.batch(shop.take(list(range(shop.num_rows))[::-1])), table)
    for b in range(shop.num_rows):
        count = len(shop["item_ids"][b])
        alone = _h(model, tiny.batch(shop.slice(b, 1)), table)[0]
        assert len(alone) == count
        torch.testing.assert_close(whole[b, :count], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(back[-1 - b, :count], alone, atol=1e-5, rtol=1e-5)


@every_variant
def test_unknown_history_items_change_nothing(layout: str, query_mode: str) -> None:
    model = tiny.model(layout, query_mode).interest
    known = tiny.request(["i1", "i2", "i3"], "mug", hours=[1, 2, 4])
    mixed = tiny.request(["gone", "i1", "i2", "lost", "i3"], "mug")
    h = _asked(model, [mixed, known], _table(model))
    torch.testing.assert_close(h[0], h[1], atol=1e-6, rtol=1e-6)


def test_the_latest_history_item_is_always_seen() -> None:
    """However many older or unknown items were left out before it."""
    model = tiny.model().interest
    table = _table(model)
    collator = tiny.collator(max_history=3)
    for left_out in range(7):
        ids = [*["gone"] * left_out, "i10", "i11", "i12"]
        rows = [tiny.request([*ids, last], "mug") for last in ("i1", "i2")]
        batch = collator.requests(tiny.examples(*rows))
        with torch.no_grad():
            h = model.last_interest(batch, table[batch.item_rows])
        assert (h[0] - h[1]).abs().max() > 1e-3


@every_variant
def test_requests_without_history_or_query_are_answered(layout: str, query_mode: str) -> None:
    model = tiny.model(layout, query_mode).interest
    rows = [tiny.request([], None), tiny.request(["i1"], None), tiny.request([], "mug")]
    h = _asked(model, rows, _table(model))
    assert h.isfinite().all()
    alone = _asked(model, rows[:1], _table(model))
    torch.testing.assert_close(h[:1], alone, atol=1e-6, rtol=1e-6)


def test_h_and_e_have_unit_root_mean_square() -> None:
    model = tiny.model().interest
    table = _table(model)
    batch = tiny.batch()
    for vectors in (table, _h(model, batch, table)[batch.step_mask]):
        torch.testing.assert_close(
            vectors.square().mean(-1), torch.ones(vectors.shape[:-1]), atol=1e-4, rtol=0
        )


def test_last_interest_is_the_h_of_the_last_existing_step() -> None:
    model, batch = tiny.model().interest, tiny.batch()
    table = _table(model)
    h = _h(model, batch, table)
    with torch.no_grad():
        last = model.last_interest(batch, table[batch.item_rows])
    for b, count in enumerate(batch.step_mask.sum(1).tolist()):
        assert torch.equal(last[b], h[b, count - 1])


def test_serving_needs_the_item_table_only() -> None:
    """A collator without item tokens, as at the endpoint, gives the same h."""
    model = tiny.model().interest
    table = _table(model)
    rows = tiny.examples(tiny.request(["i1", "i2"], "mug"))
    bare = Collator(tiny.catalog(), tiny.tokenizer(), tiny.PLAIN).requests(rows)
    full = tiny.collator().requests(rows)
    assert torch.equal(_h(model, bare, table), _h(model, full, table))


def test_the_seed_decides_the_new_weights_and_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second, other = (tiny.model(seed=s).interest.state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "user_decoder.projector.inner.weight"
    assert not torch.equal(first[name], other[name])

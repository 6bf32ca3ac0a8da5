"""Batches index one table of unique items, group what must not see each other, and keep their
random choices apart."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
import torch

from karma_ray.data.collate import Batch, Collator
from tests import tiny


def _ids(batch: Batch, index: torch.Tensor) -> list[str]:
    """Item ids behind an index into the batch's table of unique items."""
    return [tiny.catalog().item_ids[row] for row in batch.item_rows[index].tolist()]


def _assert_equal(left: Batch, right: Batch, *, but: tuple[str, ...] = ()) -> None:
    for field in fields(Batch):
        if field.name not in but:
            assert torch.equal(getattr(left, field.name), getattr(right, field.name)), field.name


# --- the table of unique items ---------------------------------------------------------------


def test_the_table_of_items_holds_each_item_once() -> None:
    rows = batch_rows = tiny.batch().item_rows
    assert len(rows.unique()) == len(batch_rows)


def test_the_table_holds_the_clicks_and_negatives_and_nothing_else() -> None:
    batch = tiny.batch()
    used = torch.cat([batch.item_index[batch.item_mask], batch.hard_index[batch.hard_mask]])
    assert torch.equal(used.unique(), torch.arange(len(batch.item_rows)))


def test_indices_point_at_the_clicked_items() -> None:
    table = tiny.shop()
    batch = tiny.batch(table)
    for b, ids in enumerate(table.column("item_ids").to_pylist()):
        assert _ids(batch, batch.item_index[b, : len(ids)]) == ids
        assert batch.item_mask[b].tolist() == [t < len(ids) for t in range(len(batch.item_mask[b]))]
    assert torch.equal(batch.item_mask, batch.step_mask)


def test_tokens_and_content_are_those_of_the_catalogue() -> None:
    batch = tiny.batch()
    tokens, lengths = tiny.item_tokens()
    rows = batch.item_rows.numpy()
    assert batch.item_lengths.tolist() == lengths[rows].tolist()
    assert batch.item_tokens.shape[1] == lengths[rows].max()
    np.testing.assert_array_equal(batch.item_tokens, tokens[rows][:, : batch.item_tokens.shape[1]])
    np.testing.assert_array_equal(batch.item_content, tiny.catalog().content_ids[rows])


def test_query_indices_point_at_the_queries_words() -> None:
    table = tiny.shop()
    batch = tiny.batch(table, max_query_tokens=20)
    assert len(batch.query_tokens) <= 1 + len(tiny.QUERIES)
    for b, queries in enumerate(table.column("queries").to_pylist()):
        for t, query in enumerate(queries):
            index = batch.query_index[b, t]
            words = batch.query_tokens[index, : batch.query_lengths[index]].tolist()
            assert tiny.tokenizer().decode(words).strip() == query


def test_a_batch_counts_its_windows_and_real_tokens() -> None:
    batch = tiny.batch(tiny.sequences(tiny.window(["i0", "i1", "i0"])))
    assert batch.num_windows == 1
    assert batch.num_tokens == int(batch.item_lengths.sum()) + 2 * 3


def test_moving_a_batch_changes_no_tensor() -> None:
    batch = tiny.batch()
    _assert_equal(batch, batch.to("cpu"))


# --- hard negatives --------------------------------------------------------------------------


def test_hard_negatives_are_exposed_items_of_their_own_step() -> None:
    table = tiny.shop()
    batch = tiny.batch(table, num_hard_negatives=2)
    for b, steps in enumerate(table.column("hard_negative_ids").to_pylist()):
        for t, exposed in enumerate(steps):
            chosen = _ids(batch, batch.hard_index[b, t][batch.hard_mask[b, t]])
            assert len(chosen) == 2 == len(set(chosen))
            assert set(chosen) <= set(exposed)


def test_an_item_clicked_in_the_window_is_never_a_hard_negative() -> None:
    clicks = ["i1", "i2", "i0", "i3"]
    hard = [["i3", "i9"], ["copy", "i8"], ["i1", "i2"], ["unknown", "i7"]]
    batch = tiny.batch(tiny.sequences(tiny.window(clicks, hard=hard)), num_hard_negatives=5)
    kept = [_ids(batch, batch.hard_index[0, t][batch.hard_mask[0, t]]) for t in range(4)]
    assert kept == [["i9"], ["i8"], [], ["i7"]]  # `copy` has the text of the clicked i0


def test_hard_negatives_are_drawn_anew_with_every_seed() -> None:
    drawn = {
        tuple(_ids(b, b.hard_index[b.hard_mask])) for b in (tiny.batch(seed=s) for s in (0, 1))
    }
    assert len(drawn) == 2


# --- random streams --------------------------------------------------------------------------

RANDOM = {"num_decoded": 2, "drop_query": 0.3}
HARD = ("hard_index", "hard_mask", "item_index", "item_rows", "item_tokens", "item_lengths",
        "item_content")  # fmt: skip
QUERY = ("query_index", "query_tokens", "query_lengths")
DECODE = ("decode_step", "decode_mask", "visual_feature", "visual_mask")


@pytest.mark.parametrize(
    ("change", "own"),
    [({"num_hard_negatives": 0}, HARD), ({"drop_query": 0.9}, QUERY), ({"num_decoded": 3}, DECODE)],
)
def test_a_random_choice_leaves_the_others_as_they_were(
    change: dict[str, float], own: tuple[str, ...]
) -> None:
    _assert_equal(tiny.batch(**RANDOM), tiny.batch(**{**RANDOM, **change}), but=own)


def test_a_seed_gives_its_batch_again() -> None:
    _assert_equal(tiny.batch(seed=3, **RANDOM), tiny.batch(seed=3, **RANDOM))


def test_queries_are_dropped_at_the_stated_rate_and_then_are_empty() -> None:
    table = tiny.shop(60)
    for share in (0.0, 0.3, 1.0):
        batch = tiny.batch(table, drop_query=share)
        lengths = batch.query_lengths[batch.query_index][batch.step_mask]
        assert float((lengths == 0).float().mean()) == pytest.approx(share, abs=0.08)


def test_a_missing_query_is_an_empty_one() -> None:
    batch = tiny.batch(tiny.sequences(tiny.window(["i0", "i1"], queries=[None, "mug"])))
    lengths = batch.query_lengths[batch.query_index][0]
    assert lengths[0] == 0 and lengths[1] > 0


# --- decoded positions and losses ------------------------------------------------------------


def test_decoded_positions_are_distinct_loss_steps_and_include_the_last() -> None:
    table = tiny.sequences(
        tiny.window(["i0", "i1", "i2", "i3"], loss=[False, True, True, True]),
        tiny.window(["i4", "i5"], loss=[False, True]),
        tiny.window(["i6", "i7"], loss=[False, False]),
    )
    seen = set()
    for seed in range(8):
        batch = tiny.batch(table, seed=seed, num_decoded=2)
        steps = [s[m].tolist() for s, m in zip(batch.decode_step, batch.decode_mask, strict=True)]
        assert steps[0][-1] == 3 and steps[0][0] in (1, 2)
        assert steps[1:] == [[1], []]
        seen.add(steps[0][0])
    assert seen == {1, 2}


def test_zero_decoded_positions_means_all_of_them() -> None:
    batch = tiny.batch(num_decoded=0)
    decoded = torch.zeros_like(batch.loss_mask)
    window = torch.arange(batch.num_windows)[:, None].expand_as(batch.decode_step)
    decoded[window[batch.decode_mask], batch.decode_step[batch.decode_mask]] = True
    assert torch.equal(decoded, batch.loss_mask)


def test_context_steps_are_in_no_loss() -> None:
    loss = [False, True, False]
    batch = tiny.batch(tiny.sequences(tiny.window(["i0", "i1", "i2"], loss=loss)))
    assert batch.loss_mask.tolist() == [loss]


# --- history ---------------------------------------------------------------------------------


def test_a_long_window_keeps_its_latest_steps_whole() -> None:
    ids = [f"i{n}" for n in range(8)]
    loss = [n % 2 == 0 for n in range(8)]
    hard = [[f"i{20 + n}"] for n in range(8)]
    whole = tiny.sequences(tiny.window(ids, hard=hard, loss=loss))
    batch = tiny.batch(whole, max_history=2)  # behind the newest step
    assert _ids(batch, batch.item_index[0]) == ids[5:]
    assert batch.loss_mask[0].tolist() == loss[5:]
    assert _ids(batch, batch.hard_index[0, :, 0]) == ["i25", "i26", "i27"]


def test_unknown_items_are_left_out_with_all_that_belongs_to_their_step() -> None:
    known = tiny.window(["i1", "i2"], [1, 3], hard=[["i11"], ["i12"]], loss=[True, False])
    mixed = tiny.window(
        ["gone", "i1", "lost", "i2"], hard=[["i10"], ["i11"], ["i13"], ["i12"]],
        loss=[True, True, True, False],
    )  # fmt: skip
    _assert_equal(
        tiny.batch(tiny.sequences(known)), tiny.batch(tiny.sequences(mixed)), but=("group",)
    )


def test_steps_of_one_page_or_one_instant_share_a_group() -> None:
    ids = ["i0", "i1", "i2", "i3", "i4", "i5"]
    row = tiny.window(ids, [0, 0, 1, 2, 2, 3], pages=["a", "a", "b", "c", "d", "e"])
    batch = tiny.batch(tiny.sequences(row))
    groups = batch.group[0].tolist()
    assert groups[0] == groups[1] and groups[3] == groups[4]
    assert len({groups[0], groups[2], groups[3], groups[5]}) == 4


@pytest.mark.parametrize("stamps", [None, [None, None, None]])
def test_missing_timestamps_are_no_common_instant(stamps: list[None] | None) -> None:
    row = tiny.window(["i0", "i1", "i2"], pages=["a", "a", "b"]) | {"timestamps": stamps}
    groups = tiny.batch(tiny.sequences(row)).group[0].tolist()
    assert groups[0] == groups[1] != groups[2]
    asked = tiny.request(["i0", "i1", "i2"], "mug") | {"history_timestamps": stamps}
    assert len(set(tiny.collator().requests(tiny.examples(asked)).group[0].tolist())) == 4


# --- requests --------------------------------------------------------------------------------


def test_a_request_puts_the_current_query_last_and_gives_it_no_item() -> None:
    rows = [tiny.request(["i0", "i1"], "lamp"), tiny.request([], None), tiny.request(["i2"], "mug")]
    batch = tiny.collator().requests(tiny.examples(*rows))
    assert batch.step_mask.sum(1).tolist() == [3, 1, 2]
    assert batch.item_mask.sum(1).tolist() == [2, 0, 1]
    last = batch.step_mask.sum(1) - 1
    for b, query in enumerate(["lamp", "", "mug"]):
        assert not batch.item_mask[b, last[b]]
        index = batch.query_index[b, last[b]]
        words = batch.query_tokens[index, : batch.query_lengths[index]].tolist()
        assert tiny.tokenizer().decode(words).strip() == query
    assert not batch.loss_mask.any() and batch.hard_mask.numel() == 0


HISTORY = ["gone", "lost", "i1", "i2", "i3", "i4", "i5", "never", "i6"]


@pytest.mark.parametrize("steps", range(10))
@pytest.mark.parametrize("limit", [20, 4, 2])
def test_the_current_query_is_in_a_group_of_its_own(limit: int, steps: int) -> None:
    """Also when unknown or older items are left out, so that group numbers have gaps."""
    batch = tiny.collator(max_history=limit).requests(
        tiny.examples(tiny.request(HISTORY[:steps], "mug"), tiny.request(["i0"], "mug"))
    )
    for groups, exists in zip(batch.group, batch.step_mask, strict=True):
        *earlier, current = groups[exists].tolist()
        assert current not in earlier


def test_a_request_holds_max_history_items_and_the_query() -> None:
    batch = tiny.collator(max_history=2).requests(tiny.examples(tiny.request(HISTORY, "mug")))
    assert _ids(batch, batch.item_index[0, :2]) == ["i5", "i6"]
    assert batch.step_mask.tolist() == [[True, True, True]]


def test_requests_need_no_item_tokens() -> None:
    bare = Collator(tiny.catalog(), tiny.tokenizer(), tiny.PLAIN)
    rows = tiny.examples(tiny.request(["i0", "i1"], "lamp"))
    _assert_equal(
        bare.requests(rows), tiny.collator().requests(rows), but=("item_tokens", "item_lengths")
    )


def test_a_batch_of_requests_without_any_history_can_be_made() -> None:
    batch = tiny.collator().requests(tiny.examples(tiny.request([], "mug"), tiny.request([], None)))
    assert batch.step_mask.tolist() == [[True], [True]]
    assert len(batch.item_rows) == 1


def test_no_requests_give_no_windows() -> None:
    empty = pa.Table.from_pylist([], schema=tiny.examples().schema)
    assert tiny.collator().requests(empty).num_windows == 0

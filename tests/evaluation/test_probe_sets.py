"""What models are compared on is fixed by data and seed, of one length, and never of the test."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from karma_ray.data.prompts import SpecialIds
from karma_ray.data.schema import EXAMPLES
from karma_ray.evaluation.probe_sets import (
    RequestSample,
    item_sample,
    request_sample,
    template_tokens,
    vector_sample,
    word_sample,
)
from tests import tiny

COLD = np.array([n % 4 != 0 for n in range(tiny.catalog().num_items)])  # a quarter held out


def examples(lengths: list[int]) -> pa.Table:
    """One example per history length; the clicked item is i40, the history i0, i1, ..."""
    rows = []
    for user, count in enumerate(lengths):
        row = tiny.request([f"i{n}" for n in range(count)], tiny.QUERIES[user % 5])
        past = row["history_timestamps"]
        rows.append(
            {
                **row,
                "user_id": f"u{user}",
                "timestamp": past[-1] + (past[-1] - tiny.MONDAY) if count > 1 else tiny.MONDAY,
                "page_id": f"p{user}",
                "positive_item_id": "i40",
            }
        )
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


def sample(lengths: list[int], count: int = 64) -> RequestSample | None:
    return request_sample(tiny.collator(), examples(lengths), count, seed=0)


def test_items_have_one_length_and_end_as_the_encoder_expects() -> None:
    found = item_sample(tiny.collator(), tiny.catalog(), COLD, 20, seed=0)
    tokens, lengths = tiny.item_tokens()
    width = found.tokens.shape[1]
    assert found.lengths.tolist() == [width] * 20
    assert (lengths[found.rows] >= width).all()
    assert (found.tokens[:, -1] == SpecialIds.of(tiny.tokenizer()).end_of_text).all()
    assert np.array_equal(found.tokens[:, :-1].numpy(), tokens[found.rows, : width - 1])


def test_held_out_items_come_first_and_few_are_among_many() -> None:
    few = item_sample(tiny.collator(), tiny.catalog(), COLD, 6, seed=0)
    many = item_sample(tiny.collator(), tiny.catalog(), COLD, 30, seed=0)
    assert few.num_held_out == 6 and not COLD[few.rows].any()
    assert many.num_held_out < 30
    assert many.rows[:6].tolist() == few.rows.tolist()
    other = item_sample(tiny.collator(), tiny.catalog(), COLD, 6, seed=1)
    assert other.rows.tolist() != few.rows.tolist()


def test_separators_and_special_tokens_are_template_and_words_are_not() -> None:
    found = item_sample(tiny.collator(), tiny.catalog(), COLD, 40, seed=0)
    assert found.template[:, -1].all()
    words = tiny.tokenizer()
    texts = {words.decode([t]).strip() for t in found.tokens[found.template].tolist()}
    assert "|" in texts
    kept = {words.decode([t]).strip() for t in found.tokens[~found.template].tolist()}
    assert not {"|", ">", "<|endoftext|>"} & kept
    assert len(template_tokens(words)) < 12


def test_vectors_are_of_the_whole_catalogue() -> None:
    found = vector_sample(tiny.collator(), tiny.catalog(), 10_000, seed=0)
    assert found.rows.tolist() == list(range(tiny.catalog().num_items))
    assert found.contents[0] == found.contents[-1]  # `copy` has the text of i0


def test_histories_have_the_median_length() -> None:
    found = sample([1, 2, 3, 5, 9, 9, 4])
    assert found is not None and found.num_history == 4
    assert found.requests.item_mask.sum(1).tolist() == [4] * 4
    assert found.requests.step_mask.sum(1).tolist() == [5] * 4


def test_longer_histories_lose_their_oldest_items() -> None:
    found = sample([3, 3, 8])
    assert found is not None and found.num_history == 3
    rows = found.requests.item_rows[found.requests.item_index[:, :3]]
    assert sorted(rows.tolist()) == [[0, 1, 2], [0, 1, 2], [5, 6, 7]]


def test_what_is_decoded_is_the_click_after_the_history() -> None:
    found = sample([1, 2, 3, 5])
    assert found is not None
    batch = found.targets
    assert batch.loss_mask.sum(1).tolist() == [1] * 4
    decoded = batch.item_index.gather(1, batch.decode_step)
    assert set(batch.item_rows[decoded].flatten().tolist()) == {40}
    last = batch.step_mask.sum(1) - 1
    assert torch.equal(batch.decode_step[:, 0], last)
    assert (
        batch.query_lengths[batch.query_index.gather(1, last[:, None])] > 0
    ).all()  # not dropped


@pytest.mark.parametrize("lengths", [[], [0, 0, 0, 2]])
def test_without_histories_there_is_nothing_to_look_at(lengths: list[int]) -> None:
    if not lengths:
        assert request_sample(tiny.collator(), EXAMPLES.empty_table(), 8, seed=0) is None
    else:
        assert sample(lengths) is None


def clicks(items: list[str]) -> pa.Table:
    """An example for every clicked item, with a history of two."""
    table = examples([2] * len(items))
    place = table.schema.get_field_index("positive_item_id")
    return table.set_column(place, "positive_item_id", pa.array(items, pa.string()))


def test_words_are_the_clicked_items_common_tokens() -> None:
    items = ["i0"] * 25 + ["i1"] * 30 + ["i7"] * 3  # i7's words are too rare to be asked for
    found = word_sample(tiny.collator(), clicks(items), seed=0)
    assert found is not None
    assert sum(chunk.num_windows for chunk in found.chunks) == len(found.words) == 58
    assert (np.unique(found.words[:25], axis=0).shape[0]) == 1
    assert (found.words[0] != found.words[25]).all()  # what both have, or nearly all, is left out
    counts = found.words.sum(0)
    assert (counts >= 20).all() and (counts <= 38).all()
    assert found.queries.sum(1).tolist() == [1] * 58 and found.queries.shape[1] == 5
    assert found.users[:2] == ["u0", "u1"]


def test_a_handful_of_clicks_has_no_words_to_ask_for() -> None:
    assert word_sample(tiny.collator(), clicks(["i0"] * 5), seed=0) is None
    assert word_sample(tiny.collator(), EXAMPLES.empty_table(), seed=0) is None

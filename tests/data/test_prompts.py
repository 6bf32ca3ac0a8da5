"""Texts become token rows that end where their length says."""

from __future__ import annotations

import numpy as np
import pytest

from karma_ray.data import prompts
from karma_ray.data.prompts import SpecialIds, TextMemory, encode_texts
from tests import tiny

LONG = "soft and warm in winter, dry in the rain, and never out of fashion"


def test_the_three_special_tokens_have_ids_of_their_own() -> None:
    words = tiny.tokenizer()
    special = SpecialIds.of(words)
    ids = [special.end_of_text, special.text_start, special.text_end]
    assert ids == [words.convert_tokens_to_ids(token) for token in words.text_marks]
    assert len(set(ids)) == 3


def test_every_text_ends_in_end_of_text_and_pads_with_it() -> None:
    eos = SpecialIds.of(tiny.tokenizer()).end_of_text
    tokens, lengths = encode_texts(tiny.tokenizer(), ["mug", LONG, "red shirt"], 12)
    for row, length in zip(tokens, lengths, strict=True):
        assert (row[length - 1 :] == eos).all()
        assert eos not in row[: length - 1]


def test_a_long_text_is_cut_and_still_closed() -> None:
    tokens, lengths = encode_texts(tiny.tokenizer(), [LONG], 5)
    whole = tiny.tokenizer()([LONG], add_special_tokens=False)["input_ids"][0]
    assert lengths.tolist() == [5]
    assert tokens[0, :4].tolist() == whole[:4]


def test_without_end_a_query_is_only_its_words() -> None:
    tokens, lengths = encode_texts(tiny.tokenizer(), ["", "mug", LONG], 4, end=False)
    mug = tiny.tokenizer()(["mug"], add_special_tokens=False)["input_ids"][0]
    assert lengths.tolist() == [0, len(mug), 4]
    assert tokens[1, : len(mug)].tolist() == mug


def test_an_empty_text_is_its_end_alone() -> None:
    _, lengths = encode_texts(tiny.tokenizer(), [""], 4)
    assert lengths.tolist() == [1]


def test_no_texts_give_no_rows() -> None:
    tokens, lengths = encode_texts(tiny.tokenizer(), [], 4)
    assert tokens.shape == (0, 1) and lengths.shape == (0,)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    alone, size = encode_texts(tiny.tokenizer(), ["mug"], 12)
    beside, sizes = encode_texts(tiny.tokenizer(), [LONG, "mug"], 12)
    assert size[0] == sizes[1]
    np.testing.assert_array_equal(beside[1, : size[0]], alone[0])


def test_the_text_survives_the_round_trip() -> None:
    tokens, lengths = encode_texts(tiny.tokenizer(), ["red shirt | house 0"], 32)
    words = tiny.tokenizer().decode(tokens[0, : lengths[0]].tolist(), skip_special_tokens=True)
    assert words.strip() == "red shirt | house 0"


@pytest.mark.parametrize("capacity", [1, 3, 100])
def test_remembered_texts_are_encoded_as_at_first(capacity: int) -> None:
    memory = TextMemory(tiny.tokenizer(), 4, capacity)
    for texts in (["", "mug"], ["mug", LONG, "", "mug"], ["lamp"], [""], [LONG, "lamp", "mug"], []):
        tokens, lengths = memory.encode(texts)
        expected, expected_lengths = encode_texts(tiny.tokenizer(), texts, 4, end=False)
        np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_array_equal(lengths, expected_lengths)


def test_a_remembered_text_is_not_tokenized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = TextMemory(tiny.tokenizer(), 4)
    memory.encode(["mug", "lamp"])
    monkeypatch.setattr(prompts, "encode_texts", None)
    assert memory.encode(["lamp", "mug", "lamp"])[1].shape == (3,)

"""Special tokens are roles that a vocabulary fills; two bodies share one vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from karma_ray.config import Config
from karma_ray.data.prompts import SpecialIds, SpecialTokens, encode_texts
from karma_ray.errors import InputError
from karma_ray.model.backbone import build_tiny, save_body
from karma_ray.model.backbones.registry import FAMILIES
from karma_ray.model.backbones.tokenizer import ROLES, load_tokenizer, save_tokenizer
from karma_ray.runs.stages import is_tiny, with_checkpoints
from tests import tiny

CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA_2 = ("<unk>", "<s>", "</s>")
WORDS = ("red", "blue", "shirt", "mug")


def _words(folder: Path, tokens: Sequence[str], added: Sequence[str] = (), **names: str) -> None:
    """A tokenizer of whole words, as a checkpoint would bring it: without our file of roles."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0]))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **names)
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("tokens", "marks"),
    [
        (CHAT, SpecialTokens(*CHAT)),
        ((*LLAMA_2, *CHAT), SpecialTokens(*CHAT)),
        (LLAMA_2, SpecialTokens("</s>", "<s>", "</s>")),
        (
            ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
            SpecialTokens("<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>"),
        ),
    ],
)
def test_a_vocabulary_fills_the_roles_with_tokens_it_has(
    tmp_path: Path, tokens: tuple[str, ...], marks: SpecialTokens
) -> None:
    held = (*tokens, *WORDS)
    _words(tmp_path, held)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.text_marks == marks
    assert SpecialIds.of(tokenizer) == SpecialIds(*(held.index(token) for token in marks))
    assert len(tokenizer) == len(held)  # none was added
    encoded, lengths = encode_texts(tokenizer, ["red mug", "blue"], 8)
    end = held.index(marks.end_of_text)
    assert encoded.tolist() == [
        [held.index("red"), held.index("mug"), end], [held.index("blue"), end, end]
    ]  # fmt: skip
    assert lengths.tolist() == [3, 2]


def test_an_unknown_vocabulary_fills_them_with_what_it_declares(tmp_path: Path) -> None:
    _words(tmp_path, ("[UNK]", "[start]", "[stop]"), bos_token="[start]", eos_token="[stop]")
    marks = load_tokenizer(str(tmp_path)).text_marks
    assert marks == SpecialTokens("[stop]", "[start]", "[stop]")


@pytest.mark.parametrize(
    "names", [{}, {"eos_token": "[stop]"}, {"bos_token": "[stop]", "eos_token": "[stop]"}]
)
def test_a_vocabulary_without_tokens_for_the_roles_is_refused(
    tmp_path: Path, names: dict[str, str]
) -> None:
    _words(tmp_path, ("[UNK]", "[stop]"), **names)
    with pytest.raises(InputError, match="no tokens for the roles end of text, text start and"):
        load_tokenizer(str(tmp_path))


def test_a_saved_tokenizer_keeps_its_roles_whatever_else_its_vocabulary_has(tmp_path: Path) -> None:
    """A bundle is served with the roles it was trained with, also when more are known one day."""
    _words(tmp_path / "own", (*LLAMA_2, *CHAT, *WORDS))
    tokenizer = load_tokenizer(str(tmp_path / "own"))
    tokenizer.text_marks = SpecialTokens("</s>", "<s>", "</s>")
    save_tokenizer(tokenizer, str(tmp_path / "bundle"))
    assert json.loads((tmp_path / "bundle" / ROLES).read_text()) == {
        "end_of_text": "</s>", "text_start": "<s>", "text_end": "</s>"
    }  # fmt: skip
    again = load_tokenizer(str(tmp_path / "bundle"))
    assert again.text_marks == ("</s>", "<s>", "</s>")
    assert SpecialIds.of(again) == SpecialIds(2, 1, 2)
    for ours, theirs in zip(
        encode_texts(again, ["red shirt"], 4), encode_texts(tokenizer, ["red shirt"], 4),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "has a damaged roles.json"),
        ('{"end": "</s>"}', "has a damaged roles.json"),
        ('{"end_of_text": "x", "text_start": "<s>", "text_end": "</s>"}', "names 'x' in roles"),
    ],
)
def test_damaged_roles_are_not_guessed_again(tmp_path: Path, content: str, problem: str) -> None:
    _words(tmp_path, LLAMA_2)
    (tmp_path / ROLES).write_text(content)
    with pytest.raises(InputError, match=problem):
        load_tokenizer(str(tmp_path))


# --- two checkpoints, one vocabulary ---------------------------------------------------------


def _checkpoint(
    folder: Path, family: str, tokens: Sequence[str], added: Sequence[str] = (), rows: int = 16
) -> str:
    build = FAMILIES[family].tiny
    assert build is not None
    save_body(build(tiny.BODY, rows, 0), str(folder))
    _words(folder, tokens, added)
    return str(folder)


def test_two_families_and_sizes_with_one_vocabulary_go_together(tmp_path: Path) -> None:
    item = _checkpoint(tmp_path / "item", "llama", (*CHAT, *WORDS))
    user = _checkpoint(tmp_path / "user", "qwen2", (*CHAT, *WORDS), added=["<think>"], rows=20)
    assert not is_tiny(with_checkpoints(Config(), item, user))
    assert not is_tiny(with_checkpoints(Config(), user, item))


@pytest.mark.parametrize(
    "tokens", [(*CHAT, *WORDS[::-1]), (*CHAT, *WORDS[:3]), (*CHAT[::-1], *WORDS), (*CHAT, "x")]
)
def test_another_vocabulary_is_refused_with_a_token_that_differs(
    tmp_path: Path, tokens: Sequence[str]
) -> None:
    user = _checkpoint(tmp_path / "user", "qwen3", (*CHAT, *WORDS))
    item = _checkpoint(tmp_path / "item", "qwen3", tokens)
    with pytest.raises(InputError) as caught:
        is_tiny(with_checkpoints(Config(), item, user))
    assert caught.value.field == "model.item_encoder.checkpoint" and caught.value.value == item
    message = str(caught.value)
    assert "does not share the tokenizer" in message and "tokens differ, such as" in message


def test_a_vocabulary_larger_than_the_embeddings_is_refused(tmp_path: Path) -> None:
    user = _checkpoint(tmp_path / "user", "qwen3", (*CHAT, *WORDS), rows=len(CHAT) + 3)
    with pytest.raises(InputError, match=r"embeddings of 6 tokens, but the tokenizer of .* makes"):
        is_tiny(with_checkpoints(Config(), user, user))


def test_an_item_encoder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    user = _checkpoint(tmp_path / "user", "qwen3", (*CHAT, *WORDS))
    save_body(build_tiny(tiny.BODY, 16, 0), str(tmp_path / "item"))
    with pytest.raises(InputError, match=r"model\.item_encoder\.checkpoint.* holds no tokenizer"):
        is_tiny(with_checkpoints(Config(), str(tmp_path / "item"), user))

"""Tokenisation of texts, with the special tokens that the given tokenizer names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np


class SpecialTokens(NamedTuple):
    """Names of the special tokens in a family of language models."""

    end_of_text: str
    """Ends an item's text (its state becomes the item's embedding), and is used for padding."""
    text_start: str
    """The paper's `<s>`, before decoded text."""
    text_end: str
    """The paper's `<e>`, after decoded text."""


class Tokenizer(Protocol):
    """The used part of a Hugging Face tokenizer, with its `text_marks`."""

    text_marks: SpecialTokens

    def __call__(self, text: list[str], **options: Any) -> Any: ...

    @property
    def backend_tokenizer(self) -> Any: ...

    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    def decode(self, token_ids: Any, **options: Any) -> str: ...


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens."""

    end_of_text: int
    text_start: int
    text_end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> SpecialIds:
        """Look up the ids in a tokenizer."""
        return cls(*(tokenizer.convert_tokens_to_ids(token) for token in tokenizer.text_marks))


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int, *, end: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids [N, L] int32, right-padded with the end of text, and lengths [N] int64.

    With `end`, every text is cut to max_tokens - 1 and followed by the end of text.
    """
    eos = SpecialIds.of(tokenizer).end_of_text
    room = max_tokens - 1 if end else max_tokens
    encoded: list[list[int]] = (
        tokenizer(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else []
    )
    lengths = np.array([min(len(ids), room) + end for ids in encoded], np.int64)
    tokens = np.full((len(encoded), max(1, int(lengths.max(initial=0)))), eos, np.int32)
    for row, ids in enumerate(encoded):
        kept = ids[:room]
        tokens[row, : len(kept)] = kept
    return tokens, lengths


class TextMemory:
    """A cache of the tokens of short, recurring texts such as queries."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, capacity: int = 65_536) -> None:
        self._tokenizer, self._max_tokens, self._capacity = tokenizer, max_tokens, capacity
        self._known: dict[str, np.ndarray] = {}
        self._pad = SpecialIds.of(tokenizer).end_of_text

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [N, L] int32 and lengths [N] int64: `encode_texts` without an end."""
        known = {text: self._known.get(text) for text in texts}
        new = [text for text, ids in known.items() if ids is None]
        if new:
            tokens, lengths = encode_texts(self._tokenizer, new, self._max_tokens, end=False)
            found = {t: row[:n] for t, row, n in zip(new, tokens, lengths.tolist(), strict=True)}
            known |= found
            if len(self._known) + len(found) > self._capacity:
                self._known = {}
            self._known.update(found)
        rows = [ids for ids in (known[text] for text in texts) if ids is not None]
        lengths = np.array([len(ids) for ids in rows], np.int64)
        table = np.full((len(rows), max(1, int(lengths.max(initial=0)))), self._pad, np.int32)
        if rows:
            table[np.arange(table.shape[1]) < lengths[:, None]] = np.concatenate(rows)
        return table, lengths

"""Text -> token ids. The tokenizer is passed in; special tokens carry Qwen's own names.

`<|endoftext|>` ends an item's text (its state is the item's embedding) and pads;
`<|im_start|>` and `<|im_end|>` are the paper's `<s>` and `<e>` around decoded text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

END_OF_TEXT = "<|endoftext|>"
TEXT_START = "<|im_start|>"
TEXT_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TEXT_START, TEXT_END)


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def __call__(self, text: list[str], **options: Any) -> Any: ...

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
        """Look them up in a tokenizer."""
        return cls(*(tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS))


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int, *, end: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [N, L] int32, right-padded with `<|endoftext|>`, and lengths [N] int64.

    With `end`, every text is cut to max_tokens - 1 and closed by `<|endoftext|>`.
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

"""Relevance of two texts by an LLM as it is: how much one makes the other more probable.

Legend: P pairs, I items, n texts, L tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from karma_ray.data.prompts import SpecialIds, Tokenizer
from karma_ray.model.text_losses import text_losses

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from karma_ray.codes.pairs import Pairs, Relevance

AT_ONCE = 64
"""Rows that are computed at once."""
RANDOM_PAIRS = 1000
"""Pairs of any two items that tell what chance reaches."""


def mutual_information(
    body: nn.Module, head: Tensor | None, tokens: NDArray[np.int32], lengths: NDArray[np.int64],
    tokenizer: Tokenizer,
) -> Relevance:  # fmt: skip
    """Return how many nats per token more probable a text is after the other one than alone.

    It is their pointwise mutual information, the mean of both directions, under a language model
    and its output embeddings [V, D], None if they are the token embeddings. Texts are tokens [I, L]
    with an end of text, which is left out, and lengths [I]. A line break stands before a text,
    alone as after the other one.
    """
    between = np.array(line_break(tokenizer), np.int32)

    def text(item: int) -> NDArray[np.int32]:
        return tokens[item, : lengths[item] - 1]

    def related(pairs: Pairs) -> NDArray[np.float32]:
        there, back = pairs, pairs[:, ::-1]
        items, place = np.unique(pairs, return_inverse=True)
        alone = _losses(body, head, [(between, text(item)) for item in items])
        alone = alone[place.reshape(pairs.shape)]  # [P, 2]
        after = [
            _losses(body, head, [(np.concatenate([text(a), between]), text(b)) for a, b in some])
            for some in (there, back)
        ]
        gained = alone[:, ::-1] - np.stack(after, 1)
        return np.asarray(gained.mean(1), np.float32)

    return related


def line_break(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a line break; the end of text where a tokenizer has none."""
    found = list(tokenizer(["\n"], add_special_tokens=False)["input_ids"][0])
    return found or [SpecialIds.of(tokenizer).end_of_text]


def by_chance(relevance: Relevance, num_items: int, share: float, seed: int) -> float:
    """Return the relevance that this share of random pairs of different items is above."""
    random = np.random.default_rng(seed)
    first = random.integers(num_items, size=RANDOM_PAIRS)
    second = (first + random.integers(1, max(2, num_items), size=RANDOM_PAIRS)) % num_items
    return float(np.quantile(relevance(np.stack([first, second], 1)), 1 - share))


def _losses(
    body: nn.Module, head: Tensor | None, texts: list[tuple[np.ndarray, np.ndarray]]
) -> NDArray[np.float64]:
    """Return the mean cross-entropy [n] of the second parts after the first ones; 0 of no token."""
    sizes = np.array([(len(first), len(second)) for first, second in texts])
    joined = [np.concatenate(parts) for parts in texts]
    total = text_losses(body, head, joined, sizes[:, 0], AT_ONCE)
    return np.asarray(total / np.maximum(sizes[:, 1], 1))

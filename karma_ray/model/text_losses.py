"""The loss of a language model, as it is, on texts of different lengths.

Legend: n or N texts, L tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from karma_ray.model.backbone import run_body, token_embeddings
from karma_ray.objectives.text import token_cross_entropy

if TYPE_CHECKING:
    from numpy.typing import NDArray


@torch.no_grad()
def text_losses(
    body: nn.Module, head: Tensor | None, texts: Sequence[NDArray[np.int32]],
    firsts: NDArray[np.int64], at_once: int = 16,
) -> NDArray[np.float64]:  # fmt: skip
    """Return the sum [n] of the cross-entropy, in nats, of every token of a text from its `firsts`
    [n] on; the first token of all has none.

    Takes n texts of tokens [L], the output embeddings [V, D], None if they are the token
    embeddings, and how many texts are computed at once, which bounds the memory.
    """
    rows = token_embeddings(body)
    head = rows if head is None else head
    lengths = np.array([len(text) for text in texts], np.int64)
    order, found = np.argsort(lengths, kind="stable"), np.zeros(len(texts))
    for start in tqdm(range(0, len(order), at_once), desc="texts", disable=None, leave=False):
        some = order[start : start + at_once]
        width = max(2, int(lengths[some].max()))
        batch = np.zeros((len(some), width), np.int64)
        for row, number in enumerate(some):
            batch[row, : lengths[number]] = texts[number]
        place = np.arange(1, width)
        there = place < lengths[some, None]
        ids, real, wanted = (
            torch.from_numpy(values).to(rows.device)
            for values in (batch, there, there & (place >= firsts[some, None]))
        )
        states = run_body(body, rows[ids[:, :-1]], real=real)
        values = token_cross_entropy(states, head, ids[:, 1:], wanted)
        found[some] = values.double().sum(1).cpu().numpy()
    return found


def next_token_loss(
    body: nn.Module, head: Tensor | None, tokens: NDArray[np.int32], lengths: NDArray[np.int64]
) -> float:
    """Return the mean cross-entropy in nats of every token of a text but its first one, in float32.

    Takes right-padded tokens [N, L], lengths [N], and the output embeddings [V, D], None if they
    are the token embeddings. NaN if no text has two tokens.
    """
    texts = [text[:length] for text, length in zip(tokens, lengths, strict=True)]
    total = float(text_losses(body, head, texts, np.ones_like(lengths)).sum())
    count = int(np.maximum(lengths - 1, 0).sum())
    return total / count if count else float("nan")

"""What a language model still knows: its loss per token on texts that it was not trained on.

Legend: N texts, L tokens, D width, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from karma_ray.model.backbone import run_body, token_embeddings
from karma_ray.objectives.text import token_cross_entropy

BATCH = 16
"""Texts that are computed at once, which bounds the memory of the logits."""


@torch.no_grad()
def next_token_loss(
    body: nn.Module, head: Tensor | None, tokens: np.ndarray, lengths: np.ndarray
) -> float:
    """Return the mean cross-entropy in nats of every token of a text but its first one, in float32.

    Takes right-padded tokens [N, L], lengths [N], and the output embeddings [V, D], None if they
    are the token embeddings. NaN if no text has two tokens.
    """
    rows = token_embeddings(body)
    head, total = rows if head is None else head, 0.0
    order = np.argsort(lengths, kind="stable")
    for begin in range(0, len(order), BATCH):
        some = order[begin : begin + BATCH]
        width = max(2, int(lengths[some].max()))
        texts = torch.from_numpy(tokens[some, :width].astype(np.int64)).to(rows.device)
        ends = torch.from_numpy(lengths[some]).to(rows.device)
        labels = texts[:, 1:]
        real = torch.arange(labels.shape[1], device=rows.device) < ends[:, None] - 1
        states = run_body(body, rows[texts[:, :-1]], real=real)
        total += float(token_cross_entropy(states, head, labels, real).double().sum())
    count = int(np.maximum(lengths - 1, 0).sum())
    return total / count if count else float("nan")

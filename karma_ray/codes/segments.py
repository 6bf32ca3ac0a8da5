"""The attention mask of QARM V2's item alignment: text, summary, and what is generated from it.

Segment 1 is an item's text. Segment 2 are summary tokens, whose states become the embedding; they
see segment 1. Segment 3 is generated text, for example of a related item; it sees the summary and
its own earlier tokens, never segment 1, so all that it knows of the item passes the embedding.
Legend: B rows, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

PADDING, TEXT, SUMMARY, GENERATED = 0, 1, 2, 3
"""Segments of the tokens."""


def three_segments(segments: Tensor) -> Tensor:  # [B, T] -> [B, T, T]
    """Return which tokens (last axis) each token sees: True where attention is allowed.

    Text is causal. A summary token sees the text and itself, no other summary token. Generated
    tokens see all summary tokens and are causal among themselves. Padding sees itself alone, so
    that no row of a softmax is empty.
    """
    length = segments.shape[1]
    seeing, seen = segments[:, :, None], segments[:, None, :]
    ones = torch.ones(length, length, dtype=torch.bool, device=segments.device)
    causal, itself = ones.tril(), torch.eye(length, dtype=torch.bool, device=segments.device)
    text = (seeing == TEXT) & (seen == TEXT) & causal
    summary = (seeing == SUMMARY) & (seen == TEXT)
    generated = (seeing == GENERATED) & ((seen == SUMMARY) | ((seen == GENERATED) & causal))
    return text | summary | generated | itself

"""Random draws as a function of what they are for: no stream, no order, no worker.

A counter-based generator (1110.2017's idea with SplitMix64 as the mixer): the draw for a row, a
purpose and a place is a hash of the three, so that whoever collates the row, and whatever else is
drawn, the draw is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

HARD, DROP, DECODED, TOKENS, TEXTS, LEVEL, NOISE, GEN_LEVEL, GEN_NOISE, SERVED = range(10)
"""Purposes of a row's draws: hard negatives, dropped queries, decoded steps, dropped tokens,
strangers' texts, noise levels of images, their noise, both of generated embeddings in training,
and the noise that a request is served with."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def hashed(*parts: Any) -> np.ndarray:
    """One int64 hash for integers, or arrays of them that broadcast against each other."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            values = np.asarray(part).astype(np.int64).view(np.uint64)
            state = _mixed((state + _GOLDEN) ^ values)
    return np.asarray(state).view(np.int64)


def uniform(*parts: Any) -> np.ndarray:
    """Numbers in [0, 1) for the same."""
    return (hashed(*parts).view(np.uint64) >> np.uint64(11)) * 2.0**-53


def normal(keys: np.ndarray, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """N(0, 1) for keys [N] -> [N, *shape], each key with a generator of its own on `device`.

    Hashing every number would cost more than all else that is done with it. The same on every
    worker, though not on every kind of device.
    """
    found = torch.empty((len(keys), *shape), device=device)
    generator = torch.Generator(device)
    for row, key in zip(found, keys.tolist(), strict=True):
        row.normal_(generator=generator.manual_seed(key))
    return found


def text_keys(texts: Sequence[str]) -> np.ndarray:
    """Keys [N] int64 of texts, the same on every machine."""
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), "<i8")


def row_keys(count: int, seed: int) -> np.ndarray:
    """Keys [count] of rows outside a training stream."""
    return hashed(seed, np.arange(count))


def _mixed(state: Any) -> Any:
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))

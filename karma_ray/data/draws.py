"""Random draws as a hash of their purpose, independent of any random stream or worker.

It is a counter-based generator (the idea of 1110.2017, with SplitMix64 as the mixer): a draw is the
hash of a row's key, a purpose and a position. It is therefore the same for every worker that
collates the row, and does not depend on other draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

HARD, DROP, DECODED, TOKENS, TEXTS, LEVEL, NOISE, GEN_LEVEL, GEN_NOISE, SERVED = range(10)
"""Purposes of draws: hard negatives, dropped queries, decoded steps, dropped tokens, exchanged
texts, noise levels and noise of images, the same for generated embeddings in training, and the
noise for serving a request."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def hashed(*parts: Any) -> np.ndarray:
    """Return an int64 hash of integers, or of arrays that broadcast against each other."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            values = np.asarray(part).astype(np.int64).view(np.uint64)
            state = mixed((state + _GOLDEN) ^ values)
    return np.asarray(state).view(np.int64)


def uniform(*parts: Any) -> np.ndarray:
    """Return hashed numbers in [0, 1) for the same arguments."""
    return (hashed(*parts).view(np.uint64) >> np.uint64(11)) * 2.0**-53


def normal(keys: np.ndarray, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Draw N(0, 1) for keys [N] -> [N, *shape], with one generator on `device` per key.

    Hashing every number would be much slower. The draws are the same on every worker, but differ
    between kinds of devices.
    """
    found = torch.empty((len(keys), *shape), device=device)
    generator = torch.Generator(device)
    for row, key in zip(found, keys.tolist(), strict=True):
        row.normal_(generator=generator.manual_seed(key))
    return found


def text_keys(texts: Iterable[str]) -> np.ndarray:
    """Return keys [N] int64 of texts, the same on every machine."""
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), "<i8")


def row_keys(count: int, seed: int) -> np.ndarray:
    """Return keys [count] of rows outside a training stream."""
    return hashed(seed, np.arange(count))


def mixed(state: Any) -> Any:
    """Return SplitMix64's finaliser of uint64 numbers, which scatters them; one to one."""
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))

"""The lexical block: counted words of an item as further dimensions of e, without learning.

A small encoder that is trained on clicks keeps what queries ask for and loses other properties of
an item, which also carry the user's taste (docs/log.md, L23). The lexical block is fixed:
e = [learned ; lexical] is still one vector with one inner product (dense and lexical in one:
Lin and Lin, 2206.09912). It is not part of the paper.

Legend: U items, L tokens, V vocabulary, K lexical dimensions.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from torch.nn import functional

from karma_ray.errors import InputError
from karma_ray.model.adapters import Whitening, rms_normalize


class LexicalBlock(nn.Module):
    """Latent semantic analysis (Deerwester et al., 1990) of the tokens that the encoder reads.

    The block has the length of the learned part, `width` dimensions of scale 1, for any size.
    """

    weight: Tensor
    mean: Tensor

    def __init__(self, num_words: int, size: int, width: float) -> None:
        super().__init__()
        self.scale = length_ratio(width, size)
        self.register_buffer("weight", torch.zeros(num_words, size))
        self.register_buffer("mean", torch.zeros(size))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Right-padded tokens [U, L], lengths [U] -> [U, K]."""
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        summed = functional.embedding_bag(
            tokens, self.weight, mode="sum", per_sample_weights=real.to(self.weight.dtype)
        )
        return rms_normalize(summed - self.mean) * self.scale

    @torch.no_grad()
    def fit(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Fit the block to a catalogue's tokens [I, L], lengths [I].

        A word is weighted by the square root of its inverse document frequency, so that the
        product of two items contains the full weight. Raises InputError when there are too few
        items or words, or when all items have the same words.
        """
        counts = _counts(tokens, lengths, len(self.weight))
        frequency = np.asarray((counts > 0).sum(0)).ravel()
        size, num_items, num_words = self.weight.shape[1], len(tokens), int((frequency > 0).sum())
        idf = np.log(num_items / np.maximum(frequency, 1))
        most = min(num_items, num_words) - 1
        if size > most:
            message = f"must be at most {most}: there are {num_items} items and {num_words} words"
            raise InputError("model.item_encoder.lexical", size, message)
        if not idf[frequency > 0].any():
            raise InputError("model.item_encoder.lexical", size, "needs items of different words")
        weights = sp.diags(np.sqrt(idf))
        start = np.ones(min(counts.shape))  # fixed, since a random one gives random rotations
        _, strengths, axes = svds(counts @ weights, k=size, v0=start)
        projection = np.asarray(weights @ axes[np.argsort(-strengths)].T)  # [V, K]
        self.weight.copy_(torch.from_numpy(projection))
        mean = np.asarray(counts.mean(0)).ravel() @ projection
        self.mean.copy_(torch.from_numpy(mean))


class StateBlock(nn.Module):
    """The first principal axes of an LLM's states after its frozen layers, each of variance 1.

    As the lexical block it has the length of `width` dimensions of scale 1, for any size, and is
    never learned.
    """

    weight: Tensor
    mean: Tensor

    def __init__(self, num_states: int, size: int, width: float) -> None:
        super().__init__()
        if size > num_states:
            message = f"must be at most {num_states}, the width of the item encoder"
            raise InputError("model.item_encoder.lexical", size, message)
        self.scale = length_ratio(width, size)
        self.register_buffer("weight", torch.zeros(size, num_states))
        self.register_buffer("mean", torch.zeros(num_states))

    def forward(self, states: Tensor) -> Tensor:
        """Mean states of items [U, d] -> [U, K]."""
        return rms_normalize((states.float() - self.mean) @ self.weight.T) * self.scale

    @torch.no_grad()
    def fit(self, states: Tensor, ridge: float = 0.01) -> None:
        """Fit the axes to the mean states [U, d] of a sample of items; see Whitening.of."""
        found = Whitening.of(states, ridge)
        strongest = slice(len(found.scales) - len(self.weight), None)
        self.weight.copy_((found.axes * found.scales)[:, strongest].T)
        self.mean.copy_(found.mean)


def length_ratio(width: float, size: int) -> float:
    """Return the scale at which `size` dimensions have the length of `width` of scale 1."""
    return math.sqrt(width / size)


def _counts(tokens: np.ndarray, lengths: np.ndarray, num_words: int) -> sp.csr_matrix:  # [I, V]
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    rows = np.repeat(np.arange(len(tokens)), real.sum(1))
    ones = np.ones(len(rows))
    return sp.csr_matrix((ones, (rows, tokens[real])), shape=(len(tokens), num_words))

"""The interface of all models for retrieval: item embeddings e, interests h, and a score.

Legend: B windows, T steps, U items, L tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from karma_ray.data.batch import Batch
from karma_ray.data.catalog import Catalog
from karma_ray.model.adapters import Score


class RecallModel(nn.Module, ABC):
    """The abstract model that training, evaluation, index and serving use."""

    score: Score

    @property
    def is_random(self) -> bool:
        """Whether a request's answer depends on noise, and hence on the request's key."""
        return False

    @property
    @abstractmethod
    def width(self) -> int:
        """D."""

    @property
    def learned_width(self) -> int:
        """Number of learned dimensions, the first of D; only these can collapse."""
        return self.width

    @abstractmethod
    def attach_catalog(self, catalog: Catalog, data_uri: str) -> None:
        """Load what the encoder needs of a data folder's catalogue besides tokens; call it before
        items are encoded."""

    @abstractmethod
    def encode_items(self, tokens: Tensor, lengths: Tensor, rows: Tensor | None = None) -> Tensor:
        """Encode tokens [U, L], lengths [U] and catalogue rows [U] as e [U, D]."""

    @abstractmethod
    def interest(self, batch: Batch, items: Tensor) -> Tensor:
        """Return the next-interest embeddings h [B, T, D] of every step; `items` [U, D]."""

    def last_interest(self, batch: Batch, items: Tensor) -> Tensor:
        """Return h [B, D] at the last existing step of each window (a request's current query)."""
        last = batch.step_mask.sum(1) - 1
        rows = torch.arange(len(last), device=last.device)
        return self.interest(batch, items)[rows, last]

    def query_vectors(self, interest: Tensor) -> Tensor:
        """Map h to its side of the score, float32."""
        return self.score.query_vectors(interest)

    def search_vectors(self, interest: Tensor, keys: np.ndarray | None = None) -> Tensor:
        """Map h [B, D] to the vectors that a request searches with [B, K, D], float32.

        An item's score is its best over the K vectors. `keys` [B] are the requests' keys, which
        models with noise need.
        """
        return self.query_vectors(interest)[:, None]

    def index_vectors(self, items: Tensor) -> Tensor:
        """Map e to the vectors that an index stores, float32."""
        return self.score.index_vectors(items)

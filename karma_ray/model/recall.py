"""What retrieval needs of a model, whatever it is made of: e of items, h of requests, a score.

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
    """One contract for training, evaluation, index and serving."""

    score: Score

    @property
    def is_random(self) -> bool:
        """Whether a request's answer depends on noise, and so on the request's key."""
        return False

    @property
    @abstractmethod
    def width(self) -> int:
        """D."""

    @property
    def learned_width(self) -> int:
        """How many of the D dimensions, from the first, are learned: these can collapse."""
        return self.width

    @abstractmethod
    def attach_catalog(self, catalog: Catalog, data_uri: str) -> None:
        """Take what is needed of a data folder's catalogue besides tokens, before items of it are
        encoded."""

    @abstractmethod
    def encode_items(self, tokens: Tensor, lengths: Tensor, rows: Tensor | None = None) -> Tensor:
        """Tokens [U, L], lengths [U] and catalogue rows [U] -> e [U, D]."""

    @abstractmethod
    def interest(self, batch: Batch, items: Tensor) -> Tensor:
        """Next-interest embeddings h [B, T, D] at every step; `items` [U, D]."""

    def last_interest(self, batch: Batch, items: Tensor) -> Tensor:
        """h [B, D] at the last existing step of each window (a request's current query)."""
        last = batch.step_mask.sum(1) - 1
        rows = torch.arange(len(last), device=last.device)
        return self.interest(batch, items)[rows, last]

    def query_vectors(self, interest: Tensor) -> Tensor:
        """h -> its side of the score, float32."""
        return self.score.query_vectors(interest)

    def search_vectors(self, interest: Tensor, keys: np.ndarray | None = None) -> Tensor:
        """h [B, D] -> the vectors that a request searches with [B, K, D], float32.

        An item's score is its best over the K. `keys` [B] of the requests, for models that draw.
        """
        return self.query_vectors(interest)[:, None]

    def index_vectors(self, items: Tensor) -> Tensor:
        """e -> the vectors an index holds, float32."""
        return self.score.index_vectors(items)

"""DIN (1706.06978): the history is weighed against every candidate, then all is fused by layers.

Plain tensors go in and a logit per candidate comes out, without control flow that depends on data,
so that `torch.fx` can trace the model. What depends on the page alone is computed once per page
and reaches the candidates by `index_select`, right before the layers that read it.

Legend: R pages, N candidates, T history, Q query terms, D width, H hidden units, F features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from karma_ray.ranking.items import QueryEmbedding

if TYPE_CHECKING:
    from karma_ray.ranking.config import RankingConfig

INPUTS = ("history", "query", "request", "candidate", "features")
"""The fields of a batch that `Din.forward` takes, in order."""


class TargetAttention(nn.Module):
    """Sums the history, weighed by a small network of (key, candidate, key x candidate).

    As in DIN the weights are not normalised, so the strength of an interest is kept. The first
    layer is written as the sum of its parts, because that of the keys is the same for all
    candidates of a page; the difference that DIN also feeds is a sum of the parts already.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.of_key = nn.Linear(width, hidden)
        self.of_item = nn.Linear(width, hidden, bias=False)
        self.of_product = nn.Linear(width, hidden, bias=False)
        self.weight = nn.Linear(hidden, 1)

    def forward(self, keys: Tensor, there: Tensor, item: Tensor, request: Tensor) -> Tensor:
        """Return the interest in each candidate.  # [R, T, D], [R, T], [N, D], [N] -> [N, D]"""
        own = keys.index_select(0, request)  # [N, T, D]
        hidden = self.of_key(keys).index_select(0, request) + self.of_item(item).unsqueeze(1)
        hidden = torch.relu(hidden + self.of_product(own * item.unsqueeze(1)))  # [N, T, H]
        weights = self.weight(hidden).squeeze(-1) * there.index_select(0, request)
        return torch.bmm(weights.unsqueeze(1), own).squeeze(1)


class Din(nn.Module):
    """DIN over item ids, attributes and query words."""

    inputs = INPUTS

    def __init__(
        self, config: RankingConfig, items: nn.Module, features: nn.Module, num_features: int
    ) -> None:
        """`items` embeds catalogue rows, as ItemEmbedding does; `features` turns the features of
        a candidate [N, F] into `num_features` numbers."""
        super().__init__()
        width, hidden = config.width, config.hidden
        self.items = items
        self.query = QueryEmbedding(config.query_buckets, width)
        self.attention = TargetAttention(width, config.attention_hidden)
        self.features = features
        self.fusion = nn.Linear(2 * width + 4 * width + num_features, hidden)
        self.head = nn.Sequential(
            nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(hidden, max(1, hidden // 2)),
            nn.ReLU(), nn.Linear(max(1, hidden // 2), 1),
        )  # fmt: skip

    def forward(
        self, history: Tensor, query: Tensor, request: Tensor, candidate: Tensor, features: Tensor
    ) -> Tensor:
        """Return logits.  # [R, T], [R, Q], [N], [N], [N, F] -> [N]"""
        there = (history >= 0).to(self.fusion.weight.dtype)
        keys, item, words = self.items(history), self.items(candidate), self.query(query)
        user = self.user(keys, there, words)  # [R, 2 D]
        interest = self.attention(keys, there, item, request)
        asked = words.index_select(0, request)
        cross = torch.cat([interest, interest * item, asked * item, self.features(features)], -1)
        fused = torch.cat([user.index_select(0, request), item, cross], -1)
        logits: Tensor = self.head(self.fusion(fused)).squeeze(-1)
        return logits

    def user(self, keys: Tensor, there: Tensor, words: Tensor) -> Tensor:
        """Return what is known of the page alone.  # [R, T, D], [R, T], [R, D] -> [R, 2 D]"""
        mean = keys.sum(1) / there.sum(1, keepdim=True).clamp(min=1.0)
        return torch.cat([mean, words], -1)

"""SARM (2602.09401): an item's text anchors are read by a small encoder trained in the ranker.

    z_1, z_2 = encoder([summary_1, summary_2, w_1 .. w_L]) of the two summary tokens
    g_1, g_2 = sigmoid(W [x; z_1; z_2] + b)
    embedding = x + g_1 z_1 + g_2 z_2;  x is the sum of the embeddings of id and attributes

In training only the different anchors of a batch are encoded. What an item gets depends on nothing
else, so a model that serves looks all embeddings up in a bank that was filled once, and has no
text encoder. Beside it stands the control that adds a projection of the frozen vector e_i.

Legend: U rows, I items, K different anchors, L anchor tokens, D width, E width of e_i.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from karma_ray.ranking.items import INITIAL, ItemEmbedding, new_table

if TYPE_CHECKING:
    import numpy as np

    from karma_ray.ranking.items import ItemFacts

SUMMARIES = 2
LAYERS = 2
HEADS = 2
BANK_ROWS = 4096
"""Items that are encoded at once when a bank is filled."""


class AnchorEncoder(nn.Module):
    """A transformer over learned text tokens, read at its two summary tokens."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.token = new_table(vocabulary, width)
        self.place = nn.Parameter(torch.randn(length, width) * INITIAL)
        self.summary = nn.Parameter(torch.randn(SUMMARIES, width))
        layer = nn.TransformerEncoderLayer(
            width, math.gcd(width, HEADS), 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode anchors of which 0 is padding.  # [U, L] -> [U, 2, D]"""
        text = self.token(tokens) + self.place[: tokens.shape[1]]
        read = torch.cat([self.summary.expand(len(tokens), -1, -1), text], 1)
        hidden = nn.functional.pad(tokens == 0, (SUMMARIES, 0), value=False)
        states: Tensor = self.layers(read, src_key_padding_mask=hidden)
        return states[:, :SUMMARIES]


class AnchoredItems(nn.Module):
    """An item's embedding with what its anchors add; 0 for row -1."""

    tokens: Tensor
    place: Tensor

    def __init__(
        self, base: ItemEmbedding, num_items: int, num_anchors: int, vocabulary: int, length: int
    ) -> None:
        super().__init__()
        self.base, self.width = base, base.width
        self.encoder = AnchorEncoder(vocabulary, length, base.width)
        self.gate = nn.Linear((1 + SUMMARIES) * base.width, SUMMARIES)
        self.register_buffer("tokens", torch.zeros(num_anchors + 1, length, dtype=torch.long))
        self.register_buffer("place", torch.zeros(num_items + 1, dtype=torch.long))

    def know(self, facts: ItemFacts) -> None:
        """Take the attributes and the anchors of the items."""
        self.base.know(facts)
        assert facts.anchors is not None
        self.tokens[1:] = torch.from_numpy(facts.anchors.tokens)
        self.place[1:] = torch.from_numpy(facts.anchors.place + 1)

    def forget(self, rows: np.ndarray) -> None:
        """Leave items without an id of their own."""
        self.base.forget(rows)

    def forward(self, rows: Tensor) -> Tensor:
        """Embed catalogue rows, each different one once.  # [...] -> [..., D]"""
        different, place = torch.unique(rows, return_inverse=True)
        embedded, _ = self.embedded(different)
        return nn.functional.embedding(place, embedded)

    def embedded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings and gates, which are 0 for an item without anchors.

        [U] -> [U, D], [U, 2]
        """
        own: Tensor = self.base(rows)
        different, which = torch.unique(self.place[rows + 1], return_inverse=True)
        tokens = self.tokens[different]
        anchors = self.encoder(tokens)[which]
        gates = torch.sigmoid(self.gate(torch.cat([own, anchors.flatten(1)], -1)))
        gates = gates * (tokens > 0).any(1)[which].unsqueeze(1)
        return own + (gates.unsqueeze(-1) * anchors).sum(1), gates

    @torch.no_grad()
    def read_all(self) -> tuple[Tensor, Tensor]:
        """Return embeddings and gates of all items, after those of row -1.

        -> [I + 1, D], [I + 1, 2]
        """
        rows = torch.arange(-1, len(self.place) - 1, device=self.place.device)
        parts = [self.embedded(part) for part in torch.split(rows, BANK_ROWS)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


class ItemBank(nn.Module):
    """Embeddings that were computed once; the memory bank of a model that serves."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        """`table` [I + 1, D], of which the first row is that of row -1."""
        super().__init__()
        self.width = table.shape[1]
        self.register_buffer("table", table)

    def forward(self, rows: Tensor) -> Tensor:
        """Look catalogue rows up.  # [...] -> [..., D]"""
        return nn.functional.embedding(rows + 1, self.table)


def with_bank(model: nn.Module) -> nn.Module:
    """Return a model that serves: in evaluation mode, with a bank in place of its items."""
    items = cast(AnchoredItems, model.items).eval()
    bank = ItemBank(items.read_all()[0])
    served = copy.deepcopy(model, {id(items): bank}).eval()
    return served.requires_grad_(False)


def gate_values(items: AnchoredItems) -> dict[str, float]:
    """Return the mean and the spread over items of both gates, where there are anchors."""
    gates = items.eval().read_all()[1][(items.tokens > 0).any(1)[items.place]]
    if not len(gates):
        return {}
    found = {"num_anchors": float(len(items.tokens) - 1)}
    for number, values in enumerate(gates.T, 1):
        found[f"gate/{number}/mean"] = float(values.mean())
        found[f"gate/{number}/std"] = float(values.std(correction=0))
    return found


class VectorItems(nn.Module):
    """The control: an item's embedding and a projection of its frozen vector; 0 for row -1."""

    vectors: Tensor

    def __init__(self, base: ItemEmbedding, num_items: int, vector_width: int) -> None:
        super().__init__()
        self.base, self.width = base, base.width
        self.project = nn.Linear(vector_width, base.width, bias=False)
        self.register_buffer("vectors", torch.zeros(num_items + 1, vector_width))

    def know(self, facts: ItemFacts) -> None:
        """Take the attributes and the vectors of the items."""
        self.base.know(facts)
        assert facts.vectors is not None
        self.vectors[1:] = torch.from_numpy(facts.vectors)

    def forget(self, rows: np.ndarray) -> None:
        """Leave items without an id of their own."""
        self.base.forget(rows)

    def forward(self, rows: Tensor) -> Tensor:
        """Embed catalogue rows.  # [...] -> [..., D]"""
        projected: Tensor = self.project(nn.functional.embedding(rows + 1, self.vectors))
        embedded: Tensor = self.base(rows) + projected
        return embedded

"""What a CTR model knows of an item: embeddings of its id and of its attributes.

Legend: I items, A attributes, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from karma_ray.codes.table import ItemCodes
    from karma_ray.data.catalog import Catalog
    from karma_ray.ranking.anchors import Anchors

ATTRIBUTES = ("category", "brand")
INITIAL = 0.1
"""Deviation of new embeddings. With a tenth of it products of embeddings are so small that an epoch
may end before the model has learnt any interest."""


@dataclass(frozen=True)
class ItemFacts:
    """The items of a catalogue as numbers."""

    attributes: np.ndarray
    """[I, A] int64 codes from 1 on; 0 where an item has no such attribute."""
    vectors: np.ndarray | None = None
    """[I, E] float32 of length 1, the vectors of `ranking.vectors`, if the family reads them."""
    codes: ItemCodes | None = None
    """The semantic ids of the items, in their order, if the family reads them."""
    parents: Mapping[str, str] = field(default_factory=dict)
    """Content hashes of what these were read from."""
    anchors: Anchors | None = None
    """What text says of the items, if the family reads it."""

    @classmethod
    def of(cls, catalog: Catalog) -> ItemFacts:
        """Read the attributes of a catalogue."""
        return cls(np.stack([_codes(catalog, name) for name in ATTRIBUTES], axis=1))

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.attributes)

    @property
    def sizes(self) -> list[int]:
        """How many codes every attribute has, without 0."""
        return [int(code) for code in self.attributes.max(axis=0, initial=0)]


def _codes(catalog: Catalog, name: str) -> np.ndarray:
    if name not in catalog.table.column_names:
        return np.zeros(catalog.num_items, np.int64)
    coded = catalog.table.column(name).combine_chunks().dictionary_encode()
    codes: np.ndarray = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False) + 1
    return codes.astype(np.int64)


class ItemEmbedding(nn.Module):
    """The sum of the embeddings of an item's id and attributes; 0 for row -1."""

    attributes: Tensor

    def __init__(self, num_items: int, sizes: list[int], width: int) -> None:
        """`sizes` are the codes of each attribute; `know` gives the items theirs."""
        super().__init__()
        self.width = width
        self.id = new_table(num_items, width)
        self.of_attribute = nn.ModuleList([new_table(size, width) for size in sizes])
        self.register_buffer("attributes", torch.zeros(num_items + 1, len(sizes), dtype=torch.long))

    def know(self, facts: ItemFacts) -> None:
        """Take the attributes of the items."""
        self.attributes[1:] = torch.from_numpy(facts.attributes)

    def forget(self, rows: np.ndarray) -> None:
        """Leave items with their attributes alone, as ids that were never shown are noise."""
        with torch.no_grad():
            self.id.weight[torch.from_numpy(rows) + 1] = 0.0

    def forward(self, rows: Tensor) -> Tensor:
        """Embed catalogue rows.  # [...] -> [..., D]"""
        place = rows + 1
        found: Tensor = self.id(place)
        codes = torch.nn.functional.embedding(place, self.attributes)
        for number, table in enumerate(self.of_attribute):
            found = found + table(codes[..., number])
        return found


class QueryEmbedding(nn.Module):
    """The mean of the embeddings of a query's hashed words; 0 without any."""

    def __init__(self, buckets: int, width: int) -> None:
        super().__init__()
        self.words = new_table(buckets, width)

    def forward(self, query: Tensor) -> Tensor:
        """Embed queries.  # [R, Q] -> [R, D]"""
        count = (query > 0).sum(1, keepdim=True).clamp(min=1)
        mean: Tensor = self.words(query).sum(1) / count
        return mean


def new_table(size: int, width: int) -> nn.Embedding:
    """Return a table of rows 1 to `size`; row 0, for nothing, is 0 and is not trained."""
    table = nn.Embedding(size + 1, width, padding_idx=0)
    with torch.no_grad():
        table.weight[1:].normal_(std=INITIAL)
    return table

"""A Linear whose input is partly the same for all candidates of a request.

The weight's columns are taken apart (MaRI, arXiv 2602.23105): what reads the request is multiplied
once per request and repeated afterwards, what reads the candidate stays one contiguous product.

Legend: R requests, N candidates of all requests, d width of a part, h width of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Spread = Tensor | int | None
"""How rows are repeated: by the request of each candidate [N], N times, or not at all."""


def spread(values: Tensor, by: Spread) -> Tensor:  # [R, ...] -> [N, ...]
    """Repeat rows; of a single request as a view, without copies."""
    if by is None:
        return values
    if isinstance(by, int):
        return values.expand(by, *values.shape[1:])
    if len(values) == 1:
        return values.expand(len(by), *values.shape[1:])
    return values.index_select(0, by)


@dataclass(frozen=True)
class Columns:
    """Where a part stands in the input of the Linear; it may stand there several times."""

    width: int
    places: tuple[tuple[int, int], ...]
    """(sign, first column): `a - b` beside `a` uses `a` with the weights of both places."""


Product = tuple[Columns, ...]
"""Parts that are multiplied together."""


class SplitLinear(nn.Module):
    """Equals `linear` of its whole input, with the same parameters."""

    def __init__(self, linear: nn.Linear, products: Sequence[Product], starts_full: bool) -> None:
        """`starts_full`: the first product has the shape of the result."""
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.products, self.starts_full = tuple(products), starts_full
        self._blocks: list[Tensor] = []
        self._made_from: tuple[int, int] | None = None

    def forward(self, parts: Sequence[Sequence[Tensor]], by: Sequence[Spread]) -> Tensor:
        """`parts` of each product [R or N, ..., d], and how its rows are repeated -> [N, ..., h].

        The last product, which is the smallest, takes the bias.
        """
        total: Tensor | None = None
        last = len(self.products) - 1
        for n, block in enumerate(self._weights()):
            values = parts[n][0] if len(parts[n]) == 1 else torch.cat(list(parts[n]), -1)
            found = F.linear(values, block, self.bias if n == last else None)
            found = spread(found, by[n])
            if total is None:
                total = found
            elif self.starts_full:  # fresh memory of this call, so it may be written to
                total = total.add_(found)
            else:
                total = total + found
        assert total is not None
        return total

    def _weights(self) -> list[Tensor]:
        """Return a block of weights [h, d] per product, stored while nobody trains."""
        if torch.is_grad_enabled():
            return self._made()
        version = 0 if self.weight.is_inference() else self.weight._version
        now = (self.weight.data_ptr(), version)
        if self._made_from != now:
            self._blocks, self._made_from = self._made(), now
        return self._blocks

    def _made(self) -> list[Tensor]:
        return [
            torch.cat([self._of(columns) for columns in product], -1) for product in self.products
        ]

    def _of(self, columns: Columns) -> Tensor:
        total: Tensor | None = None
        for sign, begin in columns.places:
            some = self.weight[:, begin : begin + columns.width]
            some = some if sign > 0 else -some
            total = some if total is None else total + some
        assert total is not None
        return total

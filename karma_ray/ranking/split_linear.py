"""A Linear whose input is partly the same for all candidates of a request.

The weight's columns are taken apart (MaRI, arXiv 2602.23105): what reads the request is multiplied
once per request and repeated afterwards, what reads the candidate stays one contiguous product.

Legend: R requests, N candidates of all requests, T steps, d width of a part, h width of the result.
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


def weighted_rows(weights: Tensor, rows: Tensor, by: Spread) -> Tensor:
    """Multiply by matrices of requests.  # [N, S, T], [R, T, d] -> [N, S, d]"""
    if len(rows) == 1:
        return torch.matmul(weights, rows[0])
    return torch.bmm(weights, spread(rows, by))


def scaled_linear(
    steps: Tensor, item: Tensor, by: Spread, weight: Tensor, bias: Tensor | None
) -> Tensor:  # [R, T, d], [N, 1, d], [h, d] -> [N, T, h]
    """Return `Linear(steps[by] * item)`.

    For a single request its steps scale the weights instead, once for all candidates: the products
    [N, T, d] are then never in memory.
    """
    if len(steps) > 1:
        return F.linear(spread(steps, by) * item, weight, bias)
    count = steps.shape[1]
    scaled = (steps[0].unsqueeze(1) * weight).flatten(0, 1)  # [T h, d]
    found = F.linear(item.squeeze(1), scaled, None if bias is None else bias.repeat(count))
    return found.view(-1, count, weight.shape[0])


@dataclass(frozen=True)
class Columns:
    """Where a part stands in the input of the Linear; it may stand there several times."""

    width: int
    places: tuple[tuple[int, int], ...]
    """(sign, first column): `a - b` beside `a` uses `a` with the weights of both places."""


@dataclass(frozen=True)
class Summand:
    """Parts that are multiplied together."""

    columns: tuple[Columns, ...]
    is_scaled: bool = False
    """Whether the part is a product of what the request and what the candidate has."""


class SplitLinear(nn.Module):
    """Equals `linear` of its whole input, with the same parameters."""

    def __init__(self, linear: nn.Linear, summands: Sequence[Summand], starts_full: bool) -> None:
        """`starts_full`: the first summand has the shape of the result, in memory of its own."""
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.summands, self.starts_full = tuple(summands), starts_full
        self._blocks: list[Tensor] = []
        self._made_from: tuple[int, int] | None = None

    def forward(self, parts: Sequence[Sequence[Tensor]], by: Sequence[Spread]) -> Tensor:
        """`parts` of each summand [R or N, ..., d], and how its rows are repeated -> [N, ..., h].

        The last summand, which is the smallest, takes the bias.
        """
        total: Tensor | None = None
        last = len(self.summands) - 1
        for n, block in enumerate(self.blocks()):
            bias = self.bias if n == last else None
            if self.summands[n].is_scaled:
                found = scaled_linear(parts[n][0], parts[n][1], by[n], block, bias)
            else:
                values = parts[n][0] if len(parts[n]) == 1 else torch.cat(list(parts[n]), -1)
                found = spread(F.linear(values, block, bias), by[n])
            if total is None:
                total = found
            else:
                total = total.add_(found) if self.starts_full else total + found
        assert total is not None
        return total

    def blocks(self) -> list[Tensor]:
        """Return the weights [h, d] of each summand, stored while nobody trains."""
        if torch.is_grad_enabled():
            return self._made()
        version = 0 if self.weight.is_inference() else self.weight._version
        now = (self.weight.data_ptr(), version)
        if self._made_from != now:
            self._blocks, self._made_from = self._made(), now
        return self._blocks

    def _made(self) -> list[Tensor]:
        return [torch.cat([self._of(c) for c in one.columns], -1) for one in self.summands]

    def _of(self, columns: Columns) -> Tensor:
        total: Tensor | None = None
        for sign, begin in columns.places:
            some = self.weight[:, begin : begin + columns.width]
            some = some if sign > 0 else -some
            total = some if total is None else total + some
        assert total is not None
        return total

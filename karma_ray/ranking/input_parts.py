"""Takes the input of a Linear apart, into parts that concern a request and parts that do not.

Legend: N candidates, T steps, d width of a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import fx

from karma_ray.ranking.row_wise import Shapes, name_of
from karma_ray.ranking.split_linear import Columns, Summand


class Moved(NamedTuple):
    """A value whose rows are repeated: `source[by]`, both in the new graph."""

    source: fx.Node
    by: fx.Node | int


class Part(NamedTuple):
    """A summand of a Linear: sign * W[:, begin : begin + width] applied to the sources."""

    sources: tuple[fx.Node, ...]
    """Nodes of the new graph: a value, or what a request and a candidate have of a product."""
    by: fx.Node | int | None
    lead: torch.Size
    """Its shape without the last axis, once its rows are repeated."""
    width: int
    sign: int
    begin: int

    @property
    def is_scaled(self) -> bool:
        """Whether it is a product of both sides."""
        return len(self.sources) == 2

    def is_whole(self, lead: torch.Size) -> bool:
        """Whether it has the shape of the result, in memory of its own."""
        return self.is_scaled or (self.by is None and self.lead == lead)

    def is_less(self, lead: torch.Size) -> bool:
        """Whether it is smaller than what it is repeated to."""
        once = self.by is not None and not self.is_scaled
        return once or (self.lead != lead and self.lead[0] == lead[0])


class InputParts:
    """Looks behind concatenations, sums, products and `expand`."""

    def __init__(
        self, shapes: Shapes, moved: Mapping[fx.Node, Moved], value: Callable[[fx.Node], fx.Node]
    ) -> None:
        """`value` gives a value of the old graph as it is in the new one."""
        self._shapes, self._moved, self._value = shapes, moved, value

    def of(self, whole: fx.Node) -> list[Part] | None:
        """Return the parts of the input of a Linear; None if nothing is gained."""
        lead = self._shapes[whole][:-1]
        parts = self._parts(whole, lead, 1, 0)
        if not any(part.is_scaled or part.is_less(lead) for part in parts):
            return None
        alike = len({len(part.lead) for part in parts}) == 1
        together = [max(sizes) for sizes in zip(*[part.lead for part in parts], strict=alike)]
        return parts if alike and together == list(lead) else None

    def _parts(self, node: fx.Node, lead: torch.Size, sign: int, begin: int) -> list[Part]:
        shape = self._shapes[node]
        if node in self._moved:
            moved = self._moved[node]
            return [Part((moved.source,), moved.by, shape[:-1], shape[-1], sign, begin)]
        if (some := self._concatenated(node)) is not None:
            found = []
            for part in some:
                found += self._parts(part, lead, sign, begin)
                begin += self._shapes[part][-1]
            return found
        if (terms := self._two(node, ("add", "sub"))) is not None:
            other = -sign if name_of(node) == "sub" else sign
            both = [
                *self._parts(terms[0], lead, sign, begin),
                *self._parts(terms[1], lead, other, begin),
            ]
            if all(part.is_less(lead) for part in both):
                return both
        if (factors := self._two(node, ("mul",))) is not None:
            for steps, item in (factors, factors[::-1]):
                if (scaled := self._scaled(steps, item, lead, sign, begin)) is not None:
                    return [scaled]
        if (inner := self._widened(node)) is not None:
            return self._parts(inner, lead, sign, begin)
        return [Part((self._value(node),), None, shape[:-1], shape[-1], sign, begin)]

    def _concatenated(self, node: fx.Node) -> list[fx.Node] | None:
        """Return what `node` puts side by side along its last axis, if it does."""
        if name_of(node) not in ("cat", "concat") or not isinstance(node.args[0], (list, tuple)):
            return None
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        ndim = len(self._shapes[node])
        if not isinstance(dim, int) or ndim < 2 or dim % ndim != ndim - 1:
            return None
        return [part for part in node.args[0] if isinstance(part, fx.Node)]

    def _two(self, node: fx.Node, names: tuple[str, ...]) -> tuple[fx.Node, fx.Node] | None:
        """Return both arguments of an operation on values with as many axes and equal width."""
        if name_of(node) not in names or node.kwargs or len(node.args) != 2:
            return None
        left, right = node.args
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return None
        shape = self._shapes[node]
        for arg in (left, right):
            found = self._shapes.get(arg, torch.Size())
            if len(found) != len(shape) or found[-1] != shape[-1]:
                return None
        return left, right

    def _scaled(
        self, steps: fx.Node, item: fx.Node, lead: torch.Size, sign: int, begin: int
    ) -> Part | None:
        """Return `steps[by] * item` of [R, T, d] and [N, 1, d] as one part."""
        if steps not in self._moved or item in self._moved or len(lead) != 2:
            return None
        item = self._widened(item) or item
        if self._shapes[steps][:-1] != lead or self._shapes[item][:-1] != (lead[0], 1):
            return None
        moved, width = self._moved[steps], self._shapes[steps][-1]
        if lead[1] == 1:
            return None
        return Part((moved.source, self._value(item)), moved.by, lead, width, sign, begin)

    def _widened(self, node: fx.Node) -> fx.Node | None:
        """Return what `node` repeats along axes between the first and the last."""
        if name_of(node) not in ("expand", "expand_as", "broadcast_to"):
            return None
        inner = node.args[0]
        if not isinstance(inner, fx.Node) or inner not in self._shapes:
            return None
        before, after = self._shapes[inner], self._shapes[node]
        keeps = len(before) == len(after) and before[0] == after[0] and before[-1] == after[-1]
        return inner if keeps and before != after else None


def together(parts: list[Part], lead: torch.Size, contiguous: bool) -> list[list[Part]]:
    """Return the parts that are multiplied together: plain ones that are repeated in one way.

    Those of the result's shape come first, and those that are computed once per request last.
    """
    groups: dict[object, list[Part]] = {}
    for place, part in enumerate(parts):
        alone = part.sources if part.is_scaled else None
        groups.setdefault((part.by, part.lead, alone) if contiguous else place, []).append(part)
    return sorted(
        groups.values(),
        key=lambda group: (
            group[0].is_scaled, not group[0].is_whole(lead), group[0].by is not None,
            -math.prod(group[0].lead),
        ),
    )  # fmt: skip


def summand(group: list[Part]) -> Summand:
    """Return what `SplitLinear` must know of parts that are multiplied together."""
    merged: dict[object, list[Part]] = {}
    for part in group:
        merged.setdefault(part.sources, []).append(part)
    columns = tuple(
        Columns(some[0].width, tuple((part.sign, part.begin) for part in some))
        for some in merged.values()
    )
    return Summand(columns, group[0].is_scaled)

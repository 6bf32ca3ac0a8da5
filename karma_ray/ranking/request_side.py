"""Rewrites the graph of a ranking model so that what concerns a request is computed once.

Legend: R requests, N candidates, d width of a part, h width of the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx, nn

from karma_ray.ranking.row_wise import Shapes, keeps_rows_apart, name_of
from karma_ray.ranking.split_linear import Columns, Product, SplitLinear, spread

CONSTANT, REQUEST, INDEX, CANDIDATE = "constant", "request", "index", "candidate"


@dataclass(frozen=True)
class Work:
    """Multiply-adds of the Linears of a model."""

    per_request: int = 0
    per_candidate: int = 0

    def of(self, num_requests: int, num_candidates: int) -> int:
        """Return those of R requests with N candidates together."""
        return self.per_request * num_requests + self.per_candidate * num_candidates

    def plus(self, macs: int, once_per_request: bool) -> Work:
        """Return it with so many more for a row."""
        if once_per_request:
            return Work(self.per_request + macs, self.per_candidate)
        return Work(self.per_request, self.per_candidate + macs)


class _Moved(NamedTuple):
    """A value whose rows are repeated: `source[by]`, both in the new graph."""

    source: fx.Node
    by: fx.Node | int


class _Part(NamedTuple):
    """A summand of a Linear: sign * W[:, begin : begin + width] applied to `source`."""

    source: fx.Node
    by: fx.Node | int | None
    lead: torch.Size
    width: int
    sign: int
    begin: int

    @property
    def group(self) -> tuple[fx.Node | int | None, torch.Size]:
        return self.by, self.lead


class RequestSide:
    """Writes the new graph, node by node."""

    def __init__(
        self, traced: fx.GraphModule, shapes: Shapes, request_inputs: set[str],
        request_index: str, contiguous: bool,
    ) -> None:  # fmt: skip
        self.graph = fx.Graph()
        self.split: list[str] = []
        self.moved: list[str] = []
        self.before = self.after = Work()
        self._root, self._shapes, self._contiguous = traced, shapes, contiguous
        self._inputs = {name: REQUEST for name in request_inputs} | {request_index: INDEX}
        self._colours: dict[fx.Node, str] = {}
        self._values: dict[fx.Node, fx.Node] = {}
        self._moved: dict[fx.Node, _Moved] = {}
        self._fields: dict[object, fx.Node] = {}

    def rewrite(self) -> None:
        """Write all nodes."""
        for node in self._root.graph.nodes:
            self._colours[node] = self._colour(node)
            self._count(node)
            if (same := self._read_before(node)) is not None:
                self._values[node] = self._values[same]
            elif not (self._gather(node) or self._move(node) or self._split(node)):
                self._values[node] = self.graph.node_copy(node, self._value)
                if (macs := self._macs(node)) and self._colours[node] != CONSTANT:
                    self.after = self.after.plus(macs, self._colours[node] == REQUEST)

    def _colour(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return self._inputs.get(str(node.target), CANDIDATE)
        if node.op == "get_attr":
            return CONSTANT
        if node.target is getattr and node.all_input_nodes[0].op == "placeholder":
            return self._inputs.get(str(node.args[1]), CANDIDATE)
        found = {self._colours[arg] for arg in node.all_input_nodes}
        if found == {INDEX} and name_of(node) in ("long", "int", "to"):
            return INDEX
        if found and found <= {CONSTANT}:
            return CONSTANT
        return REQUEST if found and found <= {CONSTANT, REQUEST} else CANDIDATE

    def _read_before(self, node: fx.Node) -> fx.Node | None:
        """Return an earlier node that reads the same field, so that both count as one value."""
        if node.target is not getattr or node.all_input_nodes[0].op != "placeholder":
            return None
        first = self._fields.setdefault(node.args, node)
        return None if first is node else first

    def _value(self, node: fx.Node) -> fx.Node:
        """Return the value in the new graph, with its rows repeated if they were moved."""
        if node not in self._values:
            moved = self._moved[node]
            self._values[node] = self.graph.call_function(spread, (moved.source, moved.by))
        return self._values[node]

    def _gather(self, node: fx.Node) -> bool:
        """Whether `node` repeats rows of a request; then it is left to who reads it."""
        if node not in self._shapes or not node.args or not isinstance(node.args[0], fx.Node):
            return False
        rows, name = node.args[0], name_of(node)
        if self._colours[rows] != REQUEST or rows not in self._shapes:
            return False
        by: object = None
        if name == "getitem":
            by = node.args[1]
        elif name == "index_select" and len(node.args) == 3 and node.args[1] == 0:
            by = node.args[2]
        elif name == "expand" and _repeats_one_row(node, self._shapes[rows]):
            by = node.args[1]
            self._moved[node] = _Moved(
                self._value(rows), self._value(by) if isinstance(by, fx.Node) else int(str(by))
            )
            return True
        if isinstance(by, fx.Node) and self._colours[by] == INDEX:
            self._moved[node] = _Moved(self._value(rows), self._value(by))
        return node in self._moved

    def _move(self, node: fx.Node) -> bool:
        """Whether `node` runs before its rows are repeated instead of after."""
        keys = {self._moved[arg].by for arg in node.all_input_nodes if arg in self._moved}
        others = [arg for arg in node.all_input_nodes if arg not in self._moved]
        if len(keys) != 1 or any(self._colours[arg] != CONSTANT for arg in others):
            return False
        if not keeps_rows_apart(node, self._root, self._shapes, self._moved.__contains__):
            return False
        copy = self.graph.node_copy(
            node, lambda arg: self._moved[arg].source if arg in self._moved else self._value(arg)
        )
        self._moved[node] = _Moved(copy, keys.pop())
        self.moved.append(node.name)
        self.after = self.after.plus(self._macs(node), once_per_request=True)
        return True

    def _split(self, node: fx.Node) -> bool:
        """Whether `node` is a Linear that was split."""
        linear = self._linear(node)
        if linear is None or len(node.all_input_nodes) != 1 or node.kwargs:
            return False
        whole = node.all_input_nodes[0]
        lead = self._shapes[whole][:-1]
        parts = self._parts(whole, lead, 1, 0)
        if all(part.by is None and part.lead == lead for part in parts):
            return False
        if _together([part.lead for part in parts]) != tuple(lead):
            return False
        products = self._products(parts)
        products.sort(key=lambda parts: _order(parts[0], lead))
        columns: list[Product] = []
        for product in products:
            merged: dict[fx.Node, list[_Part]] = {}
            for part in product:
                merged.setdefault(part.source, []).append(part)
            columns.append(tuple(
                Columns(some[0].width, tuple((part.sign, part.begin) for part in some))
                for some in merged.values()
            ))  # fmt: skip
            width = sum(some.width for some in columns[-1])
            macs = math.prod(product[0].lead[1:]) * width * linear.out_features
            self.after = self.after.plus(macs, product[0].by is not None)
        first = products[0][0]
        module = SplitLinear(linear, columns, first.by is None and first.lead == lead)
        name = f"split_{len(self.split)}"
        self._root.add_submodule(name, module.train(linear.training))
        sources = [list(dict.fromkeys(part.source for part in product)) for product in products]
        self._values[node] = self.graph.call_module(
            name, (sources, [product[0].by for product in products])
        )
        self.split.append(str(node.target))
        return True

    def _products(self, parts: list[_Part]) -> list[list[_Part]]:
        """Return the parts that are multiplied together: those that are repeated in one way."""
        if not self._contiguous:
            return [[part] for part in parts]
        groups: dict[object, list[_Part]] = {}
        for part in parts:
            groups.setdefault(part.group, []).append(part)
        return list(groups.values())

    def _parts(self, node: fx.Node, lead: torch.Size, sign: int, begin: int) -> list[_Part]:
        """Take the input of a Linear apart; `lead` is its shape without the last axis."""
        shape = self._shapes[node]
        width = shape[-1]
        if node in self._moved:
            moved = self._moved[node]
            return [_Part(moved.source, moved.by, shape[:-1], width, sign, begin)]
        if (some := self._concatenated(node)) is not None:
            found = []
            for part in some:
                found += self._parts(part, lead, sign, begin)
                begin += self._shapes[part][-1]
            return found
        if (terms := self._terms(node)) is not None:
            name, left, right = terms
            other = -sign if name == "sub" else sign
            both = self._parts(left, lead, sign, begin), self._parts(right, lead, other, begin)
            if all(_is_less(part, lead) for some in both for part in some):
                return [*both[0], *both[1]]
        if (inner := self._widened(node)) is not None:
            return self._parts(inner, lead, sign, begin)
        return [_Part(self._value(node), None, shape[:-1], width, sign, begin)]

    def _concatenated(self, node: fx.Node) -> list[fx.Node] | None:
        """Return what `node` puts side by side along its last axis, if it does."""
        if name_of(node) not in ("cat", "concat") or not isinstance(node.args[0], (list, tuple)):
            return None
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        ndim = len(self._shapes[node])
        parts = list(node.args[0])
        if not isinstance(dim, int) or ndim < 2 or dim % ndim != ndim - 1:
            return None
        return [part for part in parts if isinstance(part, fx.Node)]

    def _terms(self, node: fx.Node) -> tuple[str, fx.Node, fx.Node] | None:
        """Return both sides of a sum or difference of values of equal width."""
        name = name_of(node)
        if name not in ("add", "sub") or node.kwargs or len(node.args) != 2:
            return None
        shape = self._shapes[node]
        for arg in node.args:
            alike = isinstance(arg, fx.Node) and len(self._shapes.get(arg, ())) == len(shape)
            if not alike or self._shapes[arg][-1] != shape[-1]:  # type: ignore[index]
                return None
        return name, node.args[0], node.args[1]  # type: ignore[return-value]

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

    def _linear(self, node: fx.Node) -> nn.Linear | None:
        if node.op != "call_module":
            return None
        module = self._root.get_submodule(str(node.target))
        return module if isinstance(module, nn.Linear) else None

    def _macs(self, node: fx.Node) -> int:
        """Return the multiply-adds of a Linear for one row."""
        linear = self._linear(node)
        if linear is None:
            return 0
        return math.prod(self._shapes[node][1:]) * linear.in_features

    def _count(self, node: fx.Node) -> None:
        if self._colours[node] != CONSTANT:
            self.before = self.before.plus(self._macs(node), self._colours[node] == REQUEST)


def _repeats_one_row(node: fx.Node, rows: torch.Size) -> bool:
    """Whether `x.expand(N, -1, ...)` repeats the only row of x, and nothing else."""
    sizes = node.args[1:]
    alike = len(sizes) == len(rows) and rows[0] == 1 and isinstance(sizes[0], (int, fx.Node))
    return alike and bool(sizes[0] != -1) and all(bool(size == -1) for size in sizes[1:])


def _together(leads: list[torch.Size]) -> tuple[int, ...] | None:
    """Return the shape of the sum of values of these shapes, if they have as many axes."""
    if len({len(lead) for lead in leads}) > 1:
        return None
    return tuple(max(sizes) for sizes in zip(*leads, strict=True))


def _is_less(part: _Part, lead: torch.Size) -> bool:
    """Whether a part is smaller than the input that it is repeated to."""
    return part.by is not None or (part.lead != lead and part.lead[0] == lead[0])


def _order(part: _Part, lead: torch.Size) -> tuple[bool, bool, int]:
    """Full parts first, and those that are computed once per request last."""
    return part.by is not None, part.lead != lead, -math.prod(part.lead)

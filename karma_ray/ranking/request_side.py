"""Rewrites the graph of a ranking model so that what concerns a request is computed once.

Legend: R requests, N candidates, d width of a part, h width of the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx, nn

from karma_ray.ranking.input_parts import InputParts, Moved, summand, together
from karma_ray.ranking.row_wise import Shapes, keeps_rows_apart, name_of
from karma_ray.ranking.split_linear import SplitLinear, spread, weighted_rows

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
        self._moved: dict[fx.Node, Moved] = {}
        self._inputs_of = InputParts(shapes, self._moved, self._value)
        self._fields: dict[object, fx.Node] = {}

    def rewrite(self) -> None:
        """Write all nodes."""
        for node in self._root.graph.nodes:
            self._colours[node] = self._colour(node)
            self._count(node)
            if (same := self._read_before(node)) is not None:
                self._values[node] = self._values[same]
            elif not any(
                attempt(node) for attempt in (self._gather, self._move, self._split, self._weigh)
            ):
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
            self._moved[node] = Moved(
                self._value(rows), self._value(by) if isinstance(by, fx.Node) else int(str(by))
            )
            return True
        if isinstance(by, fx.Node) and self._colours[by] == INDEX:
            self._moved[node] = Moved(self._value(rows), self._value(by))
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
        self._moved[node] = Moved(copy, keys.pop())
        self.moved.append(node.name)
        self.after = self.after.plus(self._macs(node), once_per_request=True)
        return True

    def _split(self, node: fx.Node) -> bool:
        """Whether `node` is a Linear that was split."""
        linear = self._linear(node)
        if linear is None or len(node.all_input_nodes) != 1 or node.kwargs:
            return False
        whole = node.all_input_nodes[0]
        parts = self._inputs_of.of(whole)
        if parts is None:
            return False
        lead = self._shapes[whole][:-1]
        groups = together(parts, lead, self._contiguous)
        summands = [summand(group) for group in groups]
        for group, one in zip(groups, summands, strict=True):
            width = sum(columns.width for columns in one.columns)
            macs = math.prod(group[0].lead[1:]) * width * linear.out_features
            once = group[0].by is not None and not one.is_scaled
            self.after = self.after.plus(macs, once_per_request=once)
        module = SplitLinear(linear, summands, groups[0][0].is_whole(lead))
        name = f"split_{len(self.split)}"
        self._root.add_submodule(name, module.train(linear.training))
        sources = [
            list(dict.fromkeys(source for part in group for source in part.sources))
            for group in groups
        ]
        self._values[node] = self.graph.call_module(
            name, (sources, [group[0].by for group in groups])
        )
        self.split.append(str(node.target))
        return True

    def _weigh(self, node: fx.Node) -> bool:
        """Whether `node` multiplies by a matrix of the request, which then is not repeated."""
        if name_of(node) not in ("bmm", "matmul") or len(node.args) != 2 or node.kwargs:
            return False
        weights, rows = node.args
        if not isinstance(weights, fx.Node) or not isinstance(rows, fx.Node):
            return False
        if rows not in self._moved or {len(self._shapes[x]) for x in (weights, rows)} != {3}:
            return False
        moved = self._moved[rows]
        self._values[node] = self.graph.call_function(
            weighted_rows, (self._value(weights), moved.source, moved.by)
        )
        return True

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

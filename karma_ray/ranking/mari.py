"""The request side of a ranking model once per request, instead of once per candidate (MaRI).

    fast, report = with_request_side(model, (batch,), request_inputs=("history", "query"))

A candidate's row of the input repeats what is known of its request. `torch.fx` traces the model,
and its graph is coloured: *request* (computed from inputs of the request alone, one row each),
*expanded* (such rows repeated, `x[request]`), and *candidate* (the rest). Operations that keep
rows apart are moved from expanded values to those of the request. Where both meet in
`Linear(cat([...]))`, the weight is split by its columns (`split_linear.py`): B (du + di) h
multiply-adds become (du + B di) h. What stands beside every step of a history is taken out in the
same way. Nothing is approximated: sums are only taken in another order.

MaRI: arXiv 2602.23105.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from karma_ray.errors import InputError
from karma_ray.ranking.request_side import RequestSide, Work
from karma_ray.ranking.row_wise import changes_in_place

NOTHING = Work()
TOLERANCE = 1e-4
"""Largest difference to the plain model on the example, beside rounding of the scale."""


@dataclass(frozen=True)
class Report:
    """What was done to a model."""

    split: tuple[str, ...] = ()
    """Names of Linears whose weights were split."""
    moved: tuple[str, ...] = ()
    """Operations that run once per request now."""
    before: Work = NOTHING
    after: Work = NOTHING
    """Multiply-adds of the Linears."""
    reason: str | None = None
    """Why the model is unchanged."""

    def saved(self, num_requests: int, num_candidates: int) -> float:
        """Return the share of multiply-adds of Linears that are no longer done."""
        before = self.before.of(num_requests, num_candidates)
        after = self.after.of(num_requests, num_candidates)
        return 1 - after / before if before else 0.0


def with_request_side(
    model: nn.Module, example: Sequence[Any], *, request_inputs: Sequence[str],
    request_index: str = "request", contiguous: bool = True,
) -> tuple[nn.Module, Report]:  # fmt: skip
    """Return a model with the same parameters and results that computes a request's side once.

    `example` are arguments of `forward`, of several requests and more candidates. An input is an
    argument or a field of one (`batch.history`); those in `request_inputs` have a row per request,
    and `request_index` has the row of each candidate. Without `contiguous` every part of an input
    is multiplied alone, to measure what that costs. A model that cannot be traced, or has nothing
    to move, is returned as it is, with a reason. The result is for models in evaluation mode;
    its gradients are those of the plain model. Raises InputError on inputs that do not exist.
    """
    if model.training:
        return model, Report(reason="the model is in training mode; call eval() first")
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:  # whatever a forward does with a value that is not there
        return model, Report(reason=f"it cannot be traced: {error}")
    _check_names(traced, example, [*request_inputs, request_index])
    for node in traced.graph.nodes:
        if changes_in_place(node, traced):
            return model, Report(reason=f"{node.name} changes a tensor in place")
    with torch.no_grad():
        expected = model(*example)
        shapes = _Shapes(traced)
        try:
            shapes.run(*example)
        except Exception as error:  # a branch that the example takes, and its graph does not
            return model, Report(reason=f"its graph does not run: {error}")
        done = RequestSide(traced, shapes.found, set(request_inputs), request_index, contiguous)
        done.rewrite()
        if not done.split and not done.moved:
            return model, Report(reason="no operation reads repeated rows of a request alone")
        fast = fx.GraphModule(traced, done.graph).eval()
        fast.graph.eliminate_dead_code()
        fast.graph.lint()
        fast.recompile()
        if not _agree(expected, fast(*example)):
            return model, Report(reason="its graph answers the example differently")
    return fast, Report(tuple(done.split), tuple(done.moved), done.before, done.after)


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shapes of its tensors."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.found: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = value.shape
        return value


def _check_names(traced: fx.GraphModule, example: Sequence[Any], names: Sequence[str]) -> None:
    placeholders = [str(node.target) for node in traced.graph.nodes if node.op == "placeholder"]
    fields: dict[str, None] = {}
    for name, value in zip(placeholders, example, strict=False):
        own = getattr(value, "_fields", None) or getattr(value, "__dataclass_fields__", None)
        fields.update(dict.fromkeys(own or [name]))
    for name in names:
        if name not in fields:
            raise InputError("request input", name, "is no input of the model", fields)


def _agree(expected: Any, found: Any) -> bool:
    pairs = zip(tree_leaves(expected), tree_leaves(found), strict=True)
    return all(
        torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        for a, b in pairs
        if isinstance(a, Tensor)
    )

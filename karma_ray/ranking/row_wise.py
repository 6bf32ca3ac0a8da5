"""Which operations of a traced model keep rows apart: row n of the result reads row n of the input.

Such an operation may be done before rows are repeated instead of after. The list is of what is
known to be safe in a model that is not being trained; whatever is not on it counts as mixing rows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

Shapes = Mapping[fx.Node, torch.Size]
"""The shape of every value of a graph that is a tensor, for one example."""

ELEMENTWISE = {
    "abs", "add", "bool", "clamp", "clamp_min", "clamp_max", "div", "double", "eq", "exp", "float",
    "ge", "gelu", "gt", "invert", "int", "le", "leaky_relu", "log", "log1p", "logical_and",
    "logical_not", "logical_or", "logsigmoid", "long", "lt", "masked_fill", "maximum", "minimum",
    "mul", "ne", "neg", "pow", "relu", "rsqrt", "sigmoid", "sign", "silu", "softplus", "sqrt",
    "square", "sub", "tanh", "to", "truediv", "type_as", "where", "and_", "or_", "elu", "hardtanh",
    "hardswish",
}  # fmt: skip
REDUCTIONS = {
    "all", "any", "amax", "amin", "logsumexp", "mean", "prod", "sum", "softmax", "log_softmax",
}  # fmt: skip
"""Operations over the axes that are their second argument, or `dim`."""
ACTIVATIONS = (
    nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.Softplus,
    nn.LogSigmoid, nn.Hardswish, nn.Embedding, nn.Dropout,
)  # fmt: skip
_IN_PLACE = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor,
    operator.setitem,
)  # fmt: skip


def name_of(node: fx.Node) -> str:
    """Return the name of a torch operation, whether called as function or method; or nothing."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        name = str(getattr(node.target, "__name__", ""))
        if any(getattr(home, name, None) is node.target for home in (torch, F, operator)):
            return name
    return ""


def changes_in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node may write into a tensor that other nodes read."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    is_call = node.op in ("call_method", "call_function")
    written = name.endswith("_") and not name.endswith(("__", "and_", "or_"))
    return is_call and (
        written
        or node.target in _IN_PLACE
        or bool(node.kwargs.get("inplace"))
        or node.kwargs.get("out") is not None
    )


def keeps_rows_apart(
    node: fx.Node, root: nn.Module, shapes: Shapes, is_moved: Callable[[fx.Node], bool]
) -> bool:
    """Whether row n of `node` depends on row n of its moved arguments only.

    Arguments that are not moved must be constants of the model.
    """
    moved = [arg for arg in node.all_input_nodes if is_moved(arg)]
    if not moved or any(arg not in shapes for arg in node.all_input_nodes) or node not in shapes:
        return False
    ndim = len(shapes[moved[0]])
    if node.op == "call_module":
        return _module_keeps(root.get_submodule(str(node.target)), ndim)
    name, args = name_of(node), node.args
    constants = [shapes[arg] for arg in node.all_input_nodes if not is_moved(arg)]
    if name in ELEMENTWISE:
        alike = len({len(shapes[arg]) for arg in moved}) == 1
        return alike and all(len(c) < ndim or (len(c) == ndim and c[0] == 1) for c in constants)
    if name == "linear":
        return ndim >= 2 and moved == [args[0]]
    if name == "embedding":
        return moved == [args[0]]
    if name == "matmul":
        by_weights = ndim >= 2 and moved == [args[0]] and len(constants[0]) == 2
        each = len(moved) == 2 and ndim >= 3 and len(shapes[moved[1]]) == ndim
        return by_weights or each
    if constants:
        return False
    if name in ("cat", "concat", "stack"):
        dim = _argument(node, 1, "dim", 0)
        alike = len({len(shapes[arg]) for arg in moved}) == 1
        return alike and _avoid_rows(dim, ndim + (name == "stack"))
    return len(moved) == 1 and moved[0] is args[0] and _shape_keeps(node, name, ndim)


def _module_keeps(module: nn.Module, ndim: int) -> bool:
    if isinstance(module, ACTIVATIONS):
        return True
    if isinstance(module, nn.BatchNorm1d):
        return module.running_mean is not None and ndim >= 2
    if isinstance(module, nn.Linear):
        return ndim >= 2
    if isinstance(module, nn.PReLU):
        return ndim >= 2 or module.num_parameters == 1
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape) < ndim
    if isinstance(module, nn.Softmax):
        return _avoid_rows(module.dim, ndim)
    return isinstance(module, nn.Flatten) and module.start_dim >= 1


def _shape_keeps(node: fx.Node, name: str, ndim: int) -> bool:
    """Decide about operations of one tensor that name axes."""
    if name in REDUCTIONS:
        return _avoid_rows(_argument(node, 1, "dim", None), ndim)
    if name == "dropout":
        return _argument(node, 2, "training", True) is False
    if name == "normalize":
        return _avoid_rows(_argument(node, 2, "dim", 1), ndim)
    if name == "unsqueeze":
        return _avoid_rows(_argument(node, 1, "dim", None), ndim + 1)
    if name == "squeeze":
        return _avoid_rows(_argument(node, 1, "dim", None), ndim)
    if name == "transpose":
        dims = [_argument(node, 1, "dim0", None), _argument(node, 2, "dim1", None)]
        return _avoid_rows(dims, ndim)
    if name == "flatten":
        start = _argument(node, 1, "start_dim", 0)
        return isinstance(start, int) and start >= 1
    if name == "layer_norm":
        shape = _argument(node, 1, "normalized_shape", None)
        return isinstance(shape, (tuple, list)) and len(shape) < ndim
    if name == "expand":
        return len(node.args) == ndim + 1 and bool(node.args[1] == -1)
    return name == "getitem" and _index_keeps(node.args[1], ndim)


def _index_keeps(index: Any, ndim: int) -> bool:
    """Whether `x[index]` takes all rows in order."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(not (p is None or p is Ellipsis or isinstance(p, (int, slice))) for p in parts):
        return False
    if parts and parts[0] is Ellipsis:
        return sum(p is not None for p in parts[1:]) < ndim
    first = parts[0] if parts else None
    return isinstance(first, slice) and bool(first == slice(None))


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _avoid_rows(dims: Any, ndim: int) -> bool:
    """Whether axes are named, and none of them is the first."""
    wanted = dims if isinstance(dims, Sequence) else [dims]
    return bool(wanted) and all(isinstance(d, int) and d % ndim != 0 for d in wanted)

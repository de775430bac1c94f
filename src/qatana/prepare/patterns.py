"""What a node of a captured graph is: the few operators that quantization treats, in all the ways users write them."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

aten = torch.ops.aten

ADD = {operator.add, operator.iadd, torch.add, aten.add.Tensor, aten.add_.Tensor}
RELU = {F.relu, F.relu_, torch.relu, torch.relu_, aten.relu.default, aten.relu_.default}
PASS_FUNCTIONS = {
    torch.flatten, F.dropout, F.max_pool2d, F.max_pool1d, F.dropout2d, operator.getitem, torch.permute, torch.transpose,
    torch.squeeze, torch.unsqueeze, torch.reshape, aten.flatten.using_ints, aten.max_pool2d.default, aten.view.default,
    aten.dropout.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.squeeze.dims, aten.clone.default,
    getattr, operator.mul,
}  # fmt: skip
PASS_METHODS = {
    "view",
    "flatten",
    "reshape",
    "permute",
    "transpose",
    "squeeze",
    "unsqueeze",
    "contiguous",
    "size",
    "clone",
}
PASS_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity, nn.Unflatten
)  # fmt: skip
GLOBAL_POOLS = {
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool1d,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool1d.default,
}
MEANS = {torch.mean, aten.mean.dim}
WINDOW_POOLS = {F.avg_pool2d, F.avg_pool1d, aten.avg_pool2d.default}


def is_add(node: fx.Node) -> bool:
    """A sum of two tensors (not of a tensor and a number, and with alpha = 1)."""
    called = (node.op == "call_function" and node.target in ADD) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    tensors = [a for a in node.args[:2] if isinstance(a, fx.Node) and rank(a) is not None]
    plain: bool = node.kwargs.get("alpha", 1) == 1 and (rank(node) or 0) > 1  # type: ignore[assignment]
    return bool(called) and len(tensors) == 2 and plain


def is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """A ReLU, however called."""
    return (
        (node.op == "call_function" and node.target in RELU)
        or (node.op == "call_method" and node.target in ("relu", "relu_"))
        or (node.op == "call_module" and type(modules[str(node.target)]) is nn.ReLU)
    )


def passes_codes(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the values of the output are values of the (only) tensor input: the quantizer before it still describes it."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], PASS_MODULES)
    if node.op == "call_method":
        return node.target in PASS_METHODS
    return node.op == "call_function" and node.target in PASS_FUNCTIONS and node.target not in (operator.mul, getattr)


def is_global_pool(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Average over the whole map, however written: adaptive pool to 1, mean over the spatial axes, or a window as large as the map."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    before, after = shape(source), shape(node)
    if before is None or after is None or len(before) < 3:
        return False
    if (node.op == "call_method" and node.target == "mean") or (node.op == "call_function" and node.target in MEANS):
        return _mean_axes(node, len(before)) == tuple(range(2, len(before)))
    pooled = after[:2] == before[:2] and all(n == 1 for n in after[2:]) and len(after) == len(before)
    if not pooled or math.prod(before[2:]) == 1:
        return False
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        if isinstance(module, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)):
            return True
        return isinstance(module, (nn.AvgPool1d, nn.AvgPool2d)) and _covers(module.kernel_size, before[2:])
    if node.op == "call_function" and node.target in GLOBAL_POOLS:
        return True
    if node.op == "call_function" and node.target in WINDOW_POOLS:
        kernel = node.args[1] if len(node.args) > 1 else node.kwargs.get("kernel_size")
        return isinstance(kernel, (int, tuple, list, fx.Node)) and (
            isinstance(kernel, fx.Node) or _covers(kernel, before[2:])
        )
    return False


def keeps_dims(node: fx.Node) -> bool:
    """Whether a global pool keeps its spatial axes (as 1)."""
    return rank(node) == rank(node.args[0])  # type: ignore[arg-type]


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's value, if it is one tensor."""
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if meta is not None and hasattr(meta, "shape") else None


def rank(node: fx.Node) -> int | None:
    """Number of dimensions of a node's value."""
    found = shape(node)
    return None if found is None else len(found)


def _covers(kernel: Any, space: tuple[int, ...]) -> bool:
    sizes = (kernel,) * len(space) if isinstance(kernel, int) else tuple(kernel)
    return sizes == space or (len(sizes) == 1 and sizes * len(space) == space)


def _mean_axes(node: fx.Node, ndim: int) -> tuple[int, ...]:
    axes: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", ())
    axes = (axes,) if isinstance(axes, int) else axes
    return tuple(sorted(a % ndim for a in axes)) if isinstance(axes, (tuple, list)) else ()

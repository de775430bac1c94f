"""Cancels quantize(dequantize(codes)) in an exported graph, so that codes flow from integer operator to integer
operator.

    quantize(dequantize(codes, p), p)                 = codes              (the identity on every code of every
    scale: measured)
    quantize(view(dequantize(codes, p)), p)           = view(codes)        (operators that only move values act on
    codes alike)
and equal quantizations of one tensor become one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
ops = torch.ops.qatana

MOVES = {
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.clone.default,
    aten.contiguous.default, aten.flatten.using_ints, aten.squeeze.dims, aten.squeeze.dim, aten.unsqueeze.default,
    aten.dropout.default, aten.max_pool2d.default,  aten._unsafe_view.default,
    aten.alias.default, aten.unflatten.int, aten.expand.default, aten.slice.Tensor, aten.select.int,
}  # fmt: skip
"""Operators whose output holds values of their first input (max pooling too: order is kept by a positive scale)."""


CHECKS = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.detach_.default}
IDENTITIES = {aten.lift_fresh_copy.default, aten.detach.default, aten.alias.default}


def simplify(graph_module: fx.GraphModule) -> None:
    """Cancel, move and merge until nothing changes; drops what becomes unused and export's guard calls."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and "_guards" in str(node.target):
            graph.erase_node(node)
    _drop_identities(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is ops.quantize.default:
            _cancel(graph, node)
    _merge(graph)
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.recompile()


def _drop_identities(graph: fx.Graph) -> None:
    """Dropout in eval mode, copies and assertions of the export: nothing of them is left in a file."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in CHECKS:
            graph.erase_node(node)
        elif node.target in IDENTITIES or (node.target is aten.dropout.default and node.args[2] is False):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)


def _grid(node: fx.Node) -> tuple[Any, Any]:
    return node.args[1], node.args[2]


def _cancel(graph: fx.Graph, quantize: fx.Node) -> None:
    """Rebuild the chain of moves between a dequantize and this quantize on the codes."""
    chain: list[fx.Node] = []
    source = quantize.args[0]
    while isinstance(source, fx.Node) and source.target in MOVES:
        chain.append(source)
        source = source.args[0]
    if (
        not isinstance(source, fx.Node)
        or source.target is not ops.dequantize.default
        or _grid(source) != _grid(quantize)
    ):
        return
    codes: Any = source.args[0]
    with graph.inserting_before(quantize):
        for move in reversed(chain):
            codes = graph.call_function(move.target, (codes, *move.args[1:]), dict(move.kwargs))  # type: ignore[arg-type]
    quantize.replace_all_uses_with(codes)
    graph.erase_node(quantize)


def _merge(graph: fx.Graph) -> None:
    """One node for equal quantizations, and for equal moves, of one tensor (names of a shared quantizer are equal)."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not (node.target in MOVES or node.target is ops.quantize.default):
            continue
        key = (node.target, _frozen(node.args), _frozen(tuple(sorted(node.kwargs.items()))))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value

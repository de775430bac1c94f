"""DequantizeLinear in front of the operators that only move values, for OpenVINO.

An artifact moves codes:  Q -> Reshape -> Transpose -> DQ -> MatMul.   OpenVINO recognizes quantization by a DequantizeLinear
directly behind the QuantizeLinear; with moves between them it runs the MatMul in float. The values are the same either way."""

from __future__ import annotations

from typing import Any

MOVES = {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Expand", "Slice", "MaxPool"}
"""Operators that commute with DequantizeLinear per tensor: they choose among the values of their first input."""


def dequantize_first(model: Any, names: set[str]) -> None:
    """Rewrite the graph of an ONNX model in place. Equal chains of moves behind equal parameters become one; values in `names` and the
    outputs of the graph keep theirs."""
    graph, made, alias, kept = model.graph, {}, {}, []
    makers = {name: node for node in graph.node for name in node.output}
    names = names | {out.name for out in graph.output}

    def dequantized(codes: str, dq: Any, own: str = "") -> str:
        """Name of the float value of `codes` (`own`, if given); the nodes that make it are appended to `kept`."""
        key, maker = (codes, *dq.input[1:], own), makers.get(codes)
        if key not in made:
            move = maker if maker is not None and maker.op_type in MOVES else None
            node = type(dq)()
            node.CopyFrom(dq if move is None else move)
            node.input[0] = codes if move is None else dequantized(move.input[0], dq)
            made[key] = node.output[0] = node.name = own or f"{codes}.{len(made)}"
            kept.append(node)
        return made[key]

    for node in graph.node:
        node.input[:] = [alias.get(name, name) for name in node.input]
        if node.op_type == "DequantizeLinear" and node.input[0] in makers:
            out = node.output[0]
            alias[out] = dequantized(node.input[0], node, out if out in names else "")
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(_live(kept, names))


def _live(nodes: list[Any], names: set[str]) -> list[Any]:
    """Without the moves whose values nobody reads any more."""
    used, live = set(names), []
    for node in reversed(nodes):
        if node.op_type not in MOVES or any(name in used for name in node.output):
            live.append(node)
            used.update(node.input)
    return live[::-1]

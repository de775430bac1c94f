"""A graph of operators as JSON, both ways. Nothing is evaluated: a target is looked up by name in torch.ops.aten,
torch.ops.qatana or a short list of arithmetic functions for shapes, and a file that names anything else is refused."""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from qatana.errors import ArtifactError

_SHAPE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "getitem", "eq", "ge", "gt", "le", "lt", "ne", "and_")
} | {"math.trunc": math.trunc, "torch.sym_max": torch.sym_max, "torch.sym_min": torch.sym_min}
_NAMES = {function: name for name, function in _SHAPE_FUNCTIONS.items()}
_FORBIDDEN = {"from_file", "set_data", "record_stream"}
_KINDS: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def encode_graph(graph: fx.Graph) -> list[dict[str, Any]]:
    """One record per node: name, op, target, args, kwargs."""
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": _target_name(node),
            "args": _encode(node.args),
            "kwargs": _encode(dict(node.kwargs)),
        }
        for node in graph.nodes
    ]


def decode_graph(records: Any, tensors: dict[str, Tensor]) -> fx.GraphModule:
    """A GraphModule over the tensors. Raises: ArtifactError for unknown operators, nodes or tensors, and for any name that is
    not a plain one: a GraphModule is generated source, so names must not be able to carry code."""
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise ArtifactError("graph.json is not a list of nodes: this file is not ours")
    for name in tensors:
        _plain(name, dotted=True)
    graph, nodes = fx.Graph(), {}
    try:
        for record in records:
            target = _find_target(record)
            if record["op"] == "get_attr" and target not in tensors:
                raise ArtifactError(
                    f"the graph needs tensor '{target}', which the checkpoint lacks; convert and save again"
                )
            args, kwargs = _decode(record["args"], nodes), _decode(record["kwargs"], nodes)
            nodes[record["name"]] = graph.create_node(record["op"], target, tuple(args), kwargs, _plain(record["name"]))
        graph.lint()
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"the artifact's graph is damaged ({error}); convert and save again") from error
    if not any(record["op"] == "output" for record in records):
        raise ArtifactError("the artifact's graph has no output; convert and save again")
    return fx.GraphModule(root_of(tensors), graph)


def _plain(name: Any, dotted: bool = False) -> str:
    """The name, if it is an identifier (dotted: identifiers or numbers joined by dots)."""
    parts = name.split(".") if isinstance(name, str) and dotted else [name]
    for part in parts:
        fine = isinstance(part, str) and (part.isidentifier() or (dotted and part.isdecimal()))
        if not fine or keyword.iskeyword(part):
            raise ArtifactError(f"{name!r} is no name of a node or tensor: this file is not ours")
    return name


def root_of(tensors: dict[str, Tensor]) -> nn.Module:
    """A module tree that holds tensors as buffers under their dotted names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        place = root
        for part in path:
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.register_buffer(leaf, tensor)
    return root


def _target_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    if node.target in _NAMES:
        return _NAMES[node.target]  # type: ignore[index]
    raise ArtifactError(f"node {node.name} calls {node.target}, which an artifact cannot hold; report this model")


def _find_target(record: dict[str, Any]) -> Any:
    name = record["target"]
    if record["op"] in ("placeholder", "output"):
        return _plain(name)
    if record["op"] == "get_attr":
        return _plain(name, dotted=True)
    if record["op"] != "call_function":
        raise ArtifactError(f"an artifact's graph has no node of kind '{record['op']}': this file is not ours")
    if name in _SHAPE_FUNCTIONS:
        return _SHAPE_FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if namespace not in ("aten", "qatana") or not packet.isidentifier() or not overload.isidentifier():
        raise ArtifactError(f"the graph calls '{name}', which is no operator of an artifact: this file is not ours")
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    if namespace == "aten" and (
        packet in _FORBIDDEN or (isinstance(found, torch._ops.OpOverload) and found._schema.is_mutable)
    ):
        raise ArtifactError(f"the graph calls '{name}', which reads files or changes its inputs: this file is not ours")
    if not isinstance(found, torch._ops.OpOverload):
        raise ArtifactError(f"operator '{name}' is unknown to this version; upgrade torch or qatana")
    return found


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        return {"map": {k: _encode(v) for k, v in value.items()}}
    if isinstance(value, torch.device):
        return {"device": value.type}
    for kind, type_ in _KINDS.items():
        if isinstance(value, type_):
            return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ArtifactError(f"a graph argument of type {type(value).__name__} cannot be stored")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        return nodes[inner]
    if kind == "map":
        return {_plain(k): _decode(v, nodes) for k, v in inner.items()}
    if kind == "device":
        return torch.device(inner)
    if kind == "float":
        return float(inner)
    found = getattr(torch, inner, None)
    if kind not in _KINDS or not isinstance(found, _KINDS[kind]):
        raise ArtifactError(f"unknown {kind} '{inner}' in the artifact's graph")
    return found

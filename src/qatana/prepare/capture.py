"""Capturing a model's forward as a graph of calls to its own modules.

FX tracing keeps the user's modules as they are. Where Python control flow stops it, torch.export captures instead, and the flat
operators it returns are lifted back into module calls that hold the same parameters, so both captures look alike afterwards."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.graph import CodeGen
from torch.fx.passes.shape_prop import ShapeProp

from qatana.errors import ModelError

aten = torch.ops.aten


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """A GraphModule that computes what the model computes and shares its parameters, with shapes on its nodes (meta)."""
    traced = isinstance(model, fx.GraphModule)
    graph_module = fx.GraphModule(model, copy.deepcopy(model.graph)) if traced else _trace(model, args, kwargs)
    for node in graph_module.graph.nodes:
        node.type = None  # annotations that are strings cannot be pickled
    _keep_unused(graph_module, model)
    dropouts = _dropouts(graph_module)
    if dropouts:
        follows = [_drops(n) for n in dropouts] if traced else _drops_in_training(model, args, kwargs, len(dropouts))
        _keep_dropout_switchable(graph_module, dropouts, follows)
    inputs = [*args, *kwargs.values()]
    with torch.no_grad(), _mode(graph_module, training=False):
        ShapeProp(graph_module).propagate(*inputs)
    return graph_module


def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool = False) -> fx.GraphModule:
    try:
        return fx.GraphModule(model, fx.Tracer().trace(model), type(model).__name__)
    except Exception as first:  # FX raises whatever the traced code raises on a proxy
        try:
            return _export(model, args, kwargs, training)
        except Exception as second:  # likewise
            raise ModelError(
                f"{type(model).__name__} can be captured neither by torch.fx ({_line(first)}) nor by torch.export "
                f"({_line(second)}); use plan(..., mode='modules'), which needs no graph"
            ) from second


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> fx.GraphModule:
    batch = torch.export.Dim.DYNAMIC
    args = tuple(torch.cat([x, x]) if x.shape[0] == 1 else x for x in args)  # export takes a batch of 1 for a constant
    kwargs = {k: torch.cat([x, x]) if x.shape[0] == 1 else x for k, x in kwargs.items()}
    dynamic = ([{0: batch} if x.ndim else None for x in args], {k: {0: batch} for k in kwargs})
    was_training = model.training
    with _mode(model, training):
        program = torch.export.export(model, args, kwargs, dynamic_shapes=_spec(model, *dynamic), strict=False)
        graph_module = program.module(check_guards=False)
    lifted = _lift(graph_module, model)
    return lifted.train(was_training)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in one mode; theirs come back."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, before in modes.items():
            module.training = before


def _spec(model: nn.Module, positional: list[Any], named: dict[str, Any]) -> Any:
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, positional, strict=False)) | named


LIFTED = {
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.linear.default,
    aten.batch_norm.default, aten.embedding.default,
}  # fmt: skip


def _lift(graph_module: Any, model: nn.Module) -> fx.GraphModule:
    """Replace aten convolution, linear, norm and embedding calls by calls of the model's own modules (by their parameters)."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    owners = {id(t): name.rpartition(".")[0] for name, t in tensors}
    modules, graph = dict(model.named_modules()), graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in LIFTED:
            continue
        named = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        found = [owners.get(id(_attribute(graph_module, str(a.target)))) for a in named]
        found += [str(a.target).rpartition(".")[0] for a in named]  # export may copy buffers
        owner = next((name for name in found if name), None)
        if owner not in modules:
            continue
        source = node.args[1] if node.target is aten.embedding.default else node.args[0]
        with graph.inserting_before(node):
            call = graph.call_module(owner, (source,))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    _drop_export_traces(graph)
    graph.eliminate_dead_code()
    return fx.GraphModule(model, graph, type(model).__name__)


DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout, torch.dropout: nn.Dropout, F.dropout2d: nn.Dropout2d, aten.dropout.default: nn.Dropout,
}  # fmt: skip


def _dropouts(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target in DROPOUTS]


def _drops(node: fx.Node) -> bool:
    """Whether a dropout is on, as traced."""
    flag = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train", True))
    return flag is not False


def _drops_in_training(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> list[bool]:
    """Which dropouts of a graph are on in training: `training=False` may be the mode of the trace or the author's own constant, and
    a trace of the model in training tells. All of them, where that trace is another graph."""
    try:
        with _mode(model, training=True):
            found = _dropouts(_trace(model, args, kwargs, training=True))
    except ModelError:
        found = []
    return [_drops(node) for node in found] if len(found) == count else [True] * count


def _keep_dropout_switchable(graph_module: fx.GraphModule, nodes: list[fx.Node], follows: list[bool]) -> None:
    """A traced dropout has the mode of that moment baked in: one that follows train() and eval() becomes a module, one that is off in
    training too goes."""
    for node, active in zip(nodes, follows, strict=True):
        source: Any = node.args[0] if node.args else node.kwargs["input"]
        if active:
            p: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            graph_module.add_submodule(node.name, DROPOUTS[node.target](p).train(graph_module.training))
            with graph_module.graph.inserting_before(node):
                source = graph_module.graph.call_module(node.name, (source,))
        node.replace_all_uses_with(source)
        graph_module.graph.erase_node(node)
    graph_module.recompile()


def _keep_unused(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """Modules that the forward does not call (auxiliary heads) stay in the state_dict."""
    held = {name for name, _ in (*graph_module.named_parameters(), *graph_module.named_buffers())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        owner = name.rpartition(".")[0]
        if name in held:
            continue
        if owner:
            module = model.get_submodule(owner)
            graph_module.add_submodule(owner, module)
            held |= {f"{owner}.{inner}" for inner, _ in (*module.named_parameters(), *module.named_buffers())}
        elif isinstance(tensor, nn.Parameter):
            graph_module.register_parameter(name, tensor)
        else:
            graph_module.register_buffer(name, tensor)


def _drop_export_traces(graph: fx.Graph) -> None:
    """Export returns a tuple through a pytree codegen and adds guard calls: make it a plain graph again."""
    graph.set_codegen(CodeGen())
    for node in list(graph.nodes):
        if node.op == "call_module" and "_guards" in str(node.target):
            graph.erase_node(node)
        if node.op == "output" and isinstance(node.args[0], (tuple, list)) and len(node.args[0]) == 1:
            node.args = (node.args[0][0],)


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value

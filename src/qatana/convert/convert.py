"""convert: the integer model of a trained QAT model, captured as a graph of integer operators, in an Artifact."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen

from qatana.artifact import Artifact
from qatana.batch import split_inputs
from qatana.convert.layers import CONVERTERS, STORERS
from qatana.convert.simplify import simplify
from qatana.errors import ModelError
from qatana.nn import Conv, Foreign, Linear
from qatana.quantizer import quantizers
from qatana.recipe import Plan


def integer_model(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A QAT model in eval mode whose quantized layers are integer layers: a copy, or with `inplace` the model itself. Tied weights
    that are quantized alike stay one.

    Raises: ModelError if it was not calibrated."""
    found = quantizers(model)
    if not found:
        raise ModelError("the model has no quantizers; call qatana.prepare(model, plan) first")
    copied = (model if inplace else copy.deepcopy(model)).eval()
    stored: dict[int, nn.Module] = {}
    converters = STORERS if plan_of(model).recipe.resolved.free else CONVERTERS
    made: dict[nn.Module, nn.Module] = {}
    for name, layer in list(copied.named_modules(remove_duplicate=False)):
        if isinstance(layer, (Linear, Conv)):
            layer.gradient = None  # a matter of training
        known = CONVERTERS if getattr(layer, "integer", False) else converters
        converter = next((known[cls] for cls in type(layer).__mro__ if cls in known), None)
        if converter is None or not (isinstance(layer, Foreign) or any(v is not None for k, v in _slots(layer))):
            continue
        parent, _, leaf = name.rpartition(".")
        if layer not in made:
            with torch.no_grad():
                made[layer] = converter(layer)
            _tie(made[layer], layer, stored)
        setattr(copied.get_submodule(parent) if parent else copied, leaf, made[layer])
    return copied


def _tie(new: nn.Module, layer: Any, stored: dict[int, nn.Module]) -> None:
    """One place for the codes of a weight that several layers have in common, with one quantizer: the first layer has it as a submodule,
    the others by a plain attribute, so that files name it once."""
    weight = new._modules.get("weight")
    if weight is None:
        return
    first = stored.setdefault(id(layer.weight_quantizer), weight)
    if first is not weight:
        del new._modules["weight"]
        new.__dict__["weight"] = first


def _slots(layer: nn.Module) -> list[tuple[str, Any]]:
    return [(key, getattr(layer, key, None)) for key in dir(layer) if key.endswith("_quantizer")]


def convert(model: nn.Module, example_inputs: Any = None) -> Artifact:
    """The Artifact of a trained model: integer codes, parameters, the plan, and the graph of integer operators.

    example_inputs  default: those of the plan. Dimension 0 (batch) and, for token ids, dimension 1 (sequence) stay
                    free."""
    plan = plan_of(model)
    args, kwargs = plan.example_inputs if example_inputs is None else split_inputs(example_inputs, model)
    if not (args or kwargs):
        raise ModelError("the plan was made by names alone; give convert(model, example_inputs) a batch")
    plan = replace(plan, example_inputs=(args, kwargs))
    graph_module = capture_integers(integer_model(model), args, kwargs)
    return Artifact.from_graph(graph_module, plan)


def plan_of(model: nn.Module) -> Plan:
    """The plan that a prepared model carries. Raises: ModelError if it carries none."""
    plan: Any = getattr(model, "qatana_plan", None) or getattr(model, "meta", {}).get("qatana_plan")
    if plan is None:
        raise ModelError("the model carries no plan; convert takes the model that qatana.prepare returned")
    return plan


class _Positional(nn.Module):
    """A model called with its example arguments by position, returning plain tensors (Hugging Face outputs: the
    logits). `fixed`: arguments that are no tensors (use_cache=False) become part of the graph."""

    def __init__(self, model: nn.Module, names: list[str], fixed: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.fixed = model, names, fixed

    def forward(self, *args: Any) -> Any:
        count = len(args) - len(self.names)
        return plain_outputs(
            self.model(*args[:count], **dict(zip(self.names, args[count:], strict=True)), **self.fixed)
        )


def plain_outputs(out: Any) -> Any:
    """The logits of a Hugging Face output, its first tensor where it has none, or the tensors themselves."""
    if hasattr(out, "items"):
        return out["logits"] if "logits" in out else next(v for v in out.values() if isinstance(v, torch.Tensor))
    return out


def capture_integers(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """The graph of a converted model, its inputs named like the model's arguments.

    torch.export with a free batch (it needs two examples: one is taken for a constant) and a free sequence; a model that fixes one of
    them (by a learned table of positions, say) gets a graph for that size."""
    fixed = {name: value for name, value in kwargs.items() if not isinstance(value, torch.Tensor)}
    kwargs = {name: value for name, value in kwargs.items() if name not in fixed}
    inputs = tuple(_two(x.cpu()) for x in (*args, *kwargs.values()))
    caller = _Positional(model.cpu(), list(kwargs), fixed)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # third-party deprecations inside torch.export and transformers
        from torch._dynamo.exc import UserError  # here: it loads what only exporting needs

        try:
            program = _export(caller, inputs, torch.export.Dim.DYNAMIC)
        except UserError:
            program = _export(caller, inputs, torch.export.Dim.AUTO)
        program = program.run_decompositions({})  # the same operators, none of them in place: x += y becomes a sum
        graph_module = program.module(check_guards=False)
    _check_operators(graph_module.graph)
    _name_inputs(graph_module.graph, input_names(args, kwargs))
    simplify(graph_module)
    return graph_module


def _check_operators(graph: fx.Graph) -> None:
    """Raise ModelError for an operator of another library, which no artifact holds."""
    for node in graph.nodes:
        library = getattr(node.target, "namespace", "aten")
        if library not in ("aten", "qatana"):
            stack = list(node.meta.get("nn_module_stack", {}).values())
            where = str(stack[-1][0]).removeprefix("model.") if stack else "the model"
            raise ModelError(
                f"{where} calls '{node.target}', an operator of {library} that no artifact holds (experts stay float for engines): "
                f"take the target 'torch', or qatana.integer_model(model), which needs no graph"
            )


def _export(caller: nn.Module, inputs: tuple[torch.Tensor, ...], free: Any) -> torch.export.ExportedProgram:
    shapes = {"args": tuple(_free(x, free) for x in inputs)}
    return torch.export.export(caller, inputs, dynamic_shapes=shapes, strict=False)


def input_names(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Names of the file's inputs: those of keyword arguments, "input" (or "input_0" ...) for positional ones."""
    positional = ["input"] if len(args) == 1 else [f"input_{i}" for i in range(len(args))]
    return [*positional, *kwargs]


def _name_inputs(graph: fx.Graph, names: list[str]) -> None:
    graph.set_codegen(CodeGen())
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=True):
        node.target = node.name = name
    for node in graph.nodes:
        if node.op == "output" and isinstance(node.args[0], (tuple, list)) and len(node.args[0]) == 1:
            node.args = (node.args[0][0],)


def _two(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x]) if x.ndim and x.shape[0] == 1 else x


def _free(x: torch.Tensor, free: Any) -> Any:
    return {0: free, 1: free} if x.ndim == 2 and not x.is_floating_point() else {0: free}

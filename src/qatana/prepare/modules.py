"""Reaching a model by module names alone: works for Hugging Face models and whatever cannot be traced.

Which tensors are the same is seen by running the example inputs once: a linear layer whose output is a view of what attention receives
as its query shares the query's quantizer; layers that read one tensor share one input quantizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qatana.nn.attention import AttentionProducts
from qatana.nn.embedding import Embedding
from qatana.nn.linear import Linear
from qatana.prepare.attention import SLOT, has_registry, listening, probing_attention, run, use_attention
from qatana.prepare.build import Builder, RowWriter, parameter_bytes, replace_module
from qatana.recipe import Plan, Recipe

KINDS: dict[type[nn.Module], str] = {nn.Linear: "linear", nn.Embedding: "embedding"}
ROLES = {"linear": ("weight", "input"), "embedding": ("weight",)}
ATTENTION = ("query", "key", "value", "probability", "context")


class Flow:
    """Which storages the layers read and write in one run. Tensors are kept, so that no storage is reused."""

    def __init__(self) -> None:
        self.inputs: dict[str, int] = {}
        self.outputs: dict[int, str] = {}
        self.attention: dict[str, tuple[int, int, int, int]] = {}
        self.kept: list[Tensor] = []

    def key(self, x: Tensor) -> int:
        self.kept.append(x)
        return x.untyped_storage().data_ptr()


def observe_flow(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
    """Run the example inputs once and note the flow between linear layers, embeddings and attention."""
    flow, names = Flow(), {module: name for name, module in model.named_modules()}

    def leaf(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        flow.inputs.setdefault(names[module], flow.key(inputs[0]))
        flow.outputs[flow.key(output)] = names[module]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, context: Tensor) -> None:
        flow.attention[names[module]] = (flow.key(query), flow.key(key), flow.key(value), flow.key(context))

    handles = [module.register_forward_hook(leaf) for module in names if type(module) in KINDS]
    try:
        with probing_attention(model), listening(attend):
            run(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return flow


def plan_modules(model: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
    """Rows for every Linear, Embedding and attention of a model."""
    flow, writer = observe_flow(model, args, kwargs), RowWriter(recipe)
    serves = _attention_rows(flow, writer)
    input_of: dict[int, str] = {}
    for name, module in model.named_modules():
        kind = KINDS.get(type(module))
        if kind is None:
            continue
        weight: Any = module.weight
        for role in ROLES[kind]:
            shape = tuple(weight.shape) if role == "weight" else None
            if name not in flow.inputs:
                writer.leave(
                    name, kind, type(module).__name__, role, "its forward never ran with the example inputs", shape
                )
            elif role == "input":
                key = flow.inputs[name]
                shared = serves.get(key) or input_of.get(key, "")
                used = writer.add(name, kind, type(module).__name__, role, shares=shared)
                if writer.complete(name, kind):
                    input_of.setdefault(key, used)
                    _linear_output(name, flow, serves, writer)
            else:
                writer.add(name, kind, type(module).__name__, role, shape)
        if kind == "linear":
            writer.gradient(name, kind, type(module).__name__)
    plan = Plan(recipe, "modules", writer.rows, (args, kwargs), parameter_bytes(model))
    weights = {id(model.get_submodule(r.module).weight): r.elements for r in plan.rows if r.role == "weight"}
    plan.rest_bytes = plan.float_bytes - 4 * sum(weights.values())
    return plan


def _attention_rows(flow: Flow, writer: RowWriter) -> dict[int, str]:
    """Rows of the attention products; returns which quantizer serves the tensor of a storage (q, k, v and the context). On a free
    target each tensor has its own: keys and values are quantized as a cache holds them, behind the rotary embedding."""
    serves: dict[int, str] = {}
    for name, (query, key, value, context) in flow.attention.items():
        keys = dict(zip(ATTENTION, (query, key, value, None, context), strict=True))
        used = {role: writer.add(f"{name}.{SLOT}", "attention", "AttentionProducts", role) for role in keys}
        if writer.complete(f"{name}.{SLOT}", "attention") and not writer.recipe.resolved.free:
            serves |= {storage: used[role] for role, storage in keys.items() if storage is not None}
    return serves


def _linear_output(name: str, flow: Flow, serves: dict[int, str], writer: RowWriter) -> None:
    """A linear layer that feeds attention hands over codes: its output is quantized before the reshape into heads."""
    for storage, producer in flow.outputs.items():
        if producer == name and storage in serves:
            writer.add(name, "linear", "Linear", "output", shares=serves[storage])


def prepare_modules(model: nn.Module, plan: Plan) -> nn.Module:
    """Replace the layers that the plan quantizes, in place; parameters are shared, names of parameters stay."""
    builder = Builder(plan)
    modules = dict(model.named_modules())
    for name in dict.fromkeys(row.module for row in plan.rows if row.kind == "attention" and row.scheme):
        products = builder.fill(AttentionProducts(builder.engine), name)
        modules[name.removesuffix(f".{SLOT}")].add_module(SLOT, products)
    for name in dict.fromkeys(row.module for row in plan.rows if row.kind in ROLES):
        if any(row.scheme for role, row in plan.of_module(name).items() if role != "output"):
            layer: Any = modules[name]
            new = _layer(layer, plan.of_module(name)["weight"].kind, builder.engine)
            replace_module(model, name, builder.fill(new, name, layer.weight))
    if has_registry(model):
        use_attention(model)
    return model


def _layer(layer: Any, kind: str, engine: str) -> nn.Module:
    new = Linear(layer.weight, layer.bias, engine) if kind == "linear" else Embedding(layer.weight, layer.padding_idx)
    return new.train(layer.training)


def is_finite(model: nn.Module) -> str:
    """Name of the first parameter that holds NaN or infinity, or ""."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return name
    return ""

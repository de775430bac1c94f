"""Reaching a model by module names alone: works for Hugging Face models and whatever cannot be traced.

Which layers there are, the registry says (`nn.registry`). Which tensors are the same is seen by running the example inputs once: a linear
layer whose output is a view of what attention receives as its query shares the query's quantizer; layers that read one tensor share one
input quantizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qatana.nn.attention import AttentionProducts
from qatana.nn.foreign import Foreign, to_matrix
from qatana.nn.registry import LayerType, layer_type
from qatana.prepare.attention import SLOT, hosts, listening, probing_attention, run, use_attention
from qatana.prepare.build import Builder, RowWriter, parameter_bytes, replace_module
from qatana.prepare.products import Products
from qatana.recipe import Plan, Recipe

ATTENTION = ("query", "key", "value", "probability", "context")


class Flow:
    """Which storages the layers read and write in one run. Tensors are kept, so that no storage is reused."""

    def __init__(self) -> None:
        self.inputs: dict[str, int] = {}
        self.outputs: dict[int, str] = {}
        self.attention: dict[str, tuple[int, int, int, int]] = {}
        self.special: dict[str, str] = {}
        self.sizes: dict[int, int] = {}
        self.normed: set[str] = set()
        self.products: dict[str, nn.Parameter] = {}
        self.kept: list[Tensor] = []

    def key(self, x: Tensor) -> int:
        self.kept.append(x)
        return x.untyped_storage().data_ptr()

    def whole(self, x: Tensor) -> int:
        """The key of a tensor that is all that a layer has put out; of a part of that (q of a fused q, k, v) one of its own."""
        key = self.key(x)
        return key if self.sizes.get(key, x.numel()) == x.numel() else -1 - len(self.kept)


def observe_flow(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
    """Run the example inputs once and note the flow between layers and attention."""
    flow, names = Flow(), {module: name for name, module in model.named_modules()}

    def leaf(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        given = next((x for x in (*inputs, *named.values()) if isinstance(x, Tensor)), None)
        flow.inputs.setdefault(names[module], -1 if given is None else flow.key(given))
        if isinstance(output, Tensor):
            key = flow.key(output)
            flow.outputs[key], flow.sizes[key] = names[module], output.numel()

    def norm(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        flow.normed.add(flow.outputs.get(flow.key(inputs[0]), ""))

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, context: Tensor, special: str) -> None:
        if special:
            flow.special[names[module]] = special
            return
        flow.attention[names[module]] = (flow.whole(query), flow.whole(key), flow.whole(value), flow.key(context))

    handles = [m.register_forward_hook(leaf, with_kwargs=True) for m in names if layer_type(m) is not None]
    handles += [m.register_forward_pre_hook(norm) for m in names if "BatchNorm" in type(m).__name__]
    try:
        with probing_attention(model), listening(attend), Products(model) as products:
            run(model, args, kwargs)
        flow.products = products.found
    finally:
        for handle in handles:
            handle.remove()
    return flow


def layers_of(model: nn.Module) -> dict[str, tuple[nn.Module, LayerType]]:
    """Every layer that the registry knows, by name; children whose weights belong to their parent's entry (attention's) left out."""
    found: dict[str, tuple[nn.Module, LayerType]] = {}
    claimed: set[str] = set()
    for name, module in model.named_modules():
        entry = layer_type(module)
        if entry is None or name in claimed:
            continue
        found[name] = (module, entry)
        claimed |= {f"{name}.{path}" for path, _, _ in (p.rpartition(".") for p in entry.weights) if path}
    return found


def plan_modules(
    model: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any], flow: Flow | None = None
) -> Plan:
    """Rows for every layer that the registry knows, and for attention.   flow: where it is known, nothing is run"""
    flow, writer = observe_flow(model, args, kwargs) if flow is None else flow, RowWriter(recipe)
    _own_attention_rows(model, flow, writer)
    serves = _attention_rows(flow, writer)
    input_of: dict[int, str] = {}
    weights: dict[int, int] = {}
    for name, (module, entry) in layers_of(model).items():
        for i, (parameter, layout) in enumerate(entry.weights.items()):
            weight: Any = _find(module, parameter)
            shape = tuple(to_matrix(weight, layout).shape)
            row, key = (entry.module_of(name, parameter), type(module).__name__), flow.inputs.get(name, -1)
            weights[id(weight)] = weight.numel()
            unfit = _unfit(name, row[1], entry, flow, recipe)
            if unfit:
                _leave(writer, entry, row, shape, unfit)
            else:
                shared = serves.get(key) or input_of.get(key, "") if i == 0 else ""
                used = _layer_rows(writer, entry, row, shape, shared)
                if used is not None and i == 0:
                    input_of.setdefault(key, used)
                    if entry.kind == "linear":
                        _linear_output(name, flow, serves, writer)
    bare = {name: p for name, p in flow.products.items() if id(p) not in weights}
    _bare_rows(model, bare, writer)
    weights |= {id(p): p.numel() for p in bare.values()}
    plan = Plan(recipe, "modules", writer.rows, (args, kwargs), parameter_bytes(model))
    plan.rest_bytes = plan.float_bytes - 4 * sum(weights.values())
    return plan


def _bare_rows(model: nn.Module, parameters: dict[str, nn.Parameter], writer: RowWriter) -> None:
    """Parameters that are multiplied outside every layer that the registry knows: routers of experts, layers of the user's own."""
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        owner = type(model.get_submodule(path)).__name__
        reason = f"a bare parameter of {owner}, float unless qatana.register_layer names it"
        writer.leave(path if leaf == "weight" else name, "other", owner, "weight", reason, tuple(parameter.shape))


def _find(module: nn.Module, parameter: str) -> Tensor:
    path, _, leaf = parameter.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def _unfit(name: str, type_name: str, entry: LayerType, flow: Flow, recipe: Recipe) -> str:
    """Why a layer stays float whatever the rules say, or ""."""
    if name not in flow.inputs:
        return "its forward never ran with the example inputs"
    if recipe.resolved.free:
        return ""
    if not entry.has_kernel:
        return f"{recipe.target} has no integer kernel for {type_name}"
    if name in flow.normed:
        return f"BatchNorm follows, which {recipe.target} folds into it by graph: plan(..., mode='graph')"
    return ""


def _leave(writer: RowWriter, entry: LayerType, row: tuple[str, str], shape: tuple[int, ...], reason: str) -> None:
    for role in ("weight", "input") if entry.inputs else ("weight",):
        writer.leave(row[0], entry.kind, row[1], role, reason, shape if role == "weight" else None)


def _layer_rows(
    writer: RowWriter, entry: LayerType, row: tuple[str, str], shape: tuple[int, ...], shared: str
) -> str | None:
    """Rows of one weight; returns the quantizer of its input, None where there is none or the layer stays float."""
    name, type_name = row
    writer.add(name, entry.kind, type_name, "weight", shape)
    used = writer.add(name, entry.kind, type_name, "input", shares=shared) if entry.inputs else None
    if entry.kind == "conv" and entry.native is not None:
        writer.add(name, entry.kind, type_name, "output")
    complete = writer.complete(name, entry.kind)
    native = entry.native is not None if writer.recipe.resolved.free else entry.has_kernel
    if native and entry.inputs:
        writer.gradient(name, entry.kind, type_name)
    return used if complete else None


def _attention_rows(flow: Flow, writer: RowWriter) -> dict[int, str]:
    """Rows of the attention products; returns which quantizer serves the tensor of a storage (q, k, v and the context). On a free
    target each tensor has its own: keys and values are quantized as a cache holds them, behind the rotary embedding."""
    serves: dict[int, str] = {}
    for name, special in flow.special.items():
        reason = f"the scores take '{special}' between the two products: the model's own attention, float"
        for role in ATTENTION:
            writer.leave(f"{name}.{SLOT}", "attention", "AttentionProducts", role, reason, None)
    for name, (query, key, value, context) in flow.attention.items():
        keys = dict(zip(ATTENTION, (query, key, value, None, context), strict=True))
        used = {role: writer.add(f"{name}.{SLOT}", "attention", "AttentionProducts", role) for role in keys}
        if writer.complete(f"{name}.{SLOT}", "attention") and not writer.recipe.resolved.free:
            serves |= {storage: used[role] for role, storage in keys.items() if storage is not None}
    return serves


def _own_attention_rows(model: nn.Module, flow: Flow, writer: RowWriter) -> None:
    """Models of transformers that write their attention out: an engine could run its products on integers, but nothing leads there."""
    if writer.recipe.resolved.free or ("attention", "query") not in writer.recipe.resolved.schemes:
        return
    seen = flow.attention.keys() | flow.special.keys()
    inner = {
        name: type(m).__name__
        for name, m in model.named_modules()
        if type(m).__module__.startswith("transformers.") and type(m).__name__.endswith("Attention")
    }
    for name, type_name in inner.items():
        below = any(other.startswith(f"{name}.") for other in (*inner, *seen))
        if name not in seen and not below:
            reason = "its products are its own code, not one of transformers' attention functions"
            for role in ATTENTION:
                writer.leave(f"{name}.{SLOT}", "attention", type_name, role, reason, None)


def _linear_output(name: str, flow: Flow, serves: dict[int, str], writer: RowWriter) -> None:
    """A linear layer that feeds attention hands over codes: its output is quantized before the reshape into heads."""
    for storage, producer in flow.outputs.items():
        if producer == name and storage in serves:
            writer.add(name, "linear", "Linear", "output", shares=serves[storage])


def prepare_modules(model: nn.Module, plan: Plan) -> nn.Module:
    """Replace the layers that the plan quantizes, in place; parameters are shared, names of parameters stay."""
    builder = Builder(plan)
    modules, places = dict(model.named_modules()), _places(model)
    for name in dict.fromkeys(row.module for row in plan.rows if row.kind == "attention" and row.scheme):
        products = builder.fill(AttentionProducts(builder.engine), name)
        modules[name.removesuffix(f".{SLOT}")].add_module(SLOT, products)
    quantized = {row.module for row in plan.rows if row.scheme and row.role not in ("output", "gradient")}
    for name, (layer, entry) in layers_of(model).items():
        rows = [entry.module_of(name, parameter) for parameter in entry.weights]
        if quantized.isdisjoint(rows):
            continue
        new = entry.build(layer, builder.engine, plan.recipe.resolved.free)
        slots: Any = new.slots.values() if isinstance(new, Foreign) else (new,)
        for row, slot in zip(rows, slots, strict=True):
            builder.fill(slot, row, getattr(slot, "matrix", slot.weight))
        for place in places[layer]:
            replace_module(model, place, new)
    for host in hosts(
        model
    ):  # engines run plain products; elsewhere the user's own function stays where nothing of it is quantized
        if not plan.recipe.resolved.free or any(isinstance(m, AttentionProducts) for m in host.modules()):
            use_attention(host)
    return model


def _places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name of every module: one may stand in several places."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return found


def is_finite(model: nn.Module) -> str:
    """Name of the first parameter that holds NaN or infinity, or ""."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return name
    return ""

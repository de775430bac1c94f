"""Reaching a network by its graph: folds BatchNorm and ReLU into convolutions, quantizes residual adds and pools.

Every activation is quantized once, where it is produced; a consumer's input shares that quantizer (quantizing codes again changes
nothing). An operator that the target cannot run in integers stays float between dequantize and quantize."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from qatana.nn.conv import Conv
from qatana.nn.elementwise import Add, GlobalAveragePool
from qatana.nn.embedding import Embedding
from qatana.nn.linear import Linear
from qatana.prepare.build import Builder, RowWriter, parameter_bytes, replace_module
from qatana.prepare.capture import capture
from qatana.prepare.patterns import is_add, is_global_pool, is_relu, keeps_dims, passes_codes
from qatana.recipe import Plan, Recipe

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass
class Site:
    """One operator to quantize: its node, what is folded into it (a norm, a sum with `other`, a ReLU), and the node that stands for
    its output."""

    name: str
    kind: str
    node: fx.Node
    norm: fx.Node | None
    relu: fx.Node | None
    sum: fx.Node | None = None

    @property
    def nodes(self) -> list[fx.Node]:
        """The folded nodes, in the order of the computation."""
        return [node for node in (self.node, self.norm, self.sum, self.relu) if node is not None]

    @property
    def output(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def place(self) -> fx.Node:
        """Where all that it reads is known."""
        return self.sum or self.node

    @property
    def inputs(self) -> list[fx.Node]:
        """The tensors it reads."""
        read = list(self.node.args[: 2 if self.kind == "add" else 1])
        if self.sum is not None:
            read += [a for a in self.sum.args[:2] if a is not (self.norm or self.node)]
        return [a for a in read if isinstance(a, fx.Node)]


def find_sites(graph_module: fx.GraphModule, recipe: Recipe) -> list[Site]:
    """Convolutions, linears, embeddings, adds and global pools in graph order, with what folds into them."""
    modules = dict(graph_module.named_modules())
    calls = Counter(str(n.target) for n in graph_module.graph.nodes if n.op == "call_module")
    sites: list[Site] = []
    for node in graph_module.graph.nodes:
        kind = _kind(node, modules)
        if not kind:
            continue
        if node.op == "call_module" and calls[str(node.target)] > 1:
            continue
        norm = relu = None
        if kind == "conv":
            norm = _follower(node, lambda n: n.op == "call_module" and _folds(modules[str(n.target)]))
        if kind in ("conv", "add"):
            relu = _follower(norm or node, lambda n: is_relu(n, modules))
        name = str(node.target) if node.op == "call_module" and kind != "pool" else node.name
        sites.append(Site(name, kind, node, norm, relu))
    return _with_sums(sites, modules) if recipe.resolved.fused_sums else sites


def _with_sums(sites: list[Site], modules: Mapping[str, nn.Module]) -> list[Site]:
    """Each sum belongs to the last convolution whose output goes to it alone, without a ReLU between; others stay sums."""
    folded: set[fx.Node] = set()
    for site in reversed(sites):
        total = _follower(site.output, is_add) if site.kind == "conv" and site.relu is None else None
        if total is not None and total not in folded and total.args[0] is not total.args[1]:
            folded.add(total)
            site.sum, site.relu = total, _follower(total, lambda n: is_relu(n, modules))
    return [site for site in sites if site.node not in folded]


def _kind(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    if node.op == "call_module":
        module = modules[str(node.target)]
        if type(module) in CONVOLUTIONS:
            return "conv"
        if type(module) is nn.Linear:
            return "linear"
        if type(module) is nn.Embedding:
            return "embedding"
    if is_add(node):
        return "add"
    return "pool" if is_global_pool(node, modules) else ""


def _folds(module: Any) -> bool:
    """BatchNorm with running statistics; without them there is nothing to fold."""
    return isinstance(module, NORMS) and module.running_var is not None


def _follower(node: fx.Node, wanted: Any) -> fx.Node | None:
    """The only user of a node, if it is the wanted kind."""
    users = list(node.users)
    return users[0] if len(users) == 1 and wanted(users[0]) else None


def plan_graph(model: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
    """Rows for every site of a captured graph."""
    graph_module = capture(model, args, kwargs)
    modules = dict(graph_module.named_modules())
    writer, serves = RowWriter(recipe), {}
    found = find_sites(graph_module, recipe)
    sites, covered = {site.place: site for site in found}, {node for site in found for node in site.nodes}
    folds: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if node in sites:
            site = sites[node]
            _site_rows(site, modules, writer, serves)
            if site.norm is not None:
                folds[site.name] = str(site.norm.target)
        elif node in covered:
            continue
        elif passes_codes(node, modules) and node.all_input_nodes and node.all_input_nodes[0] in serves:
            serves[node] = serves[node.all_input_nodes[0]]
        elif node.op == "call_module" and any(True for _ in modules[str(node.target)].parameters()):
            _uncovered_row(node, modules, writer)
    plan = Plan(recipe, "graph", writer.rows, (args, kwargs), parameter_bytes(model), folds=folds)
    plan.rest_bytes = _rest_bytes(plan, modules)
    return plan


def _rest_bytes(plan: Plan, modules: Mapping[str, Any]) -> int:
    """Bytes of what is no weight of a row: folded norms vanish, their convolutions gain a bias."""
    folded = [t for name in plan.folds.values() for t in modules[name].state_dict().values() if t.ndim]
    biases = sum(4 * modules[name].weight.shape[0] for name in plan.folds)
    weights = {
        id(modules[row.module].weight): row.elements for row in plan.rows if row.role == "weight" and row.elements
    }
    return plan.float_bytes - 4 * sum(weights.values()) - sum(4 * t.numel() for t in folded) + biases


def _site_rows(site: Site, modules: Mapping[str, Any], writer: RowWriter, serves: dict[fx.Node, str]) -> None:
    layer: Any = modules[str(site.node.target)] if site.node.op == "call_module" else None
    type_name = type(layer).__name__ if layer is not None else {"add": "Add", "pool": "GlobalAveragePool"}[site.kind]
    used = True
    if site.kind in ("conv", "linear", "embedding"):
        assert layer is not None
        used = bool(writer.add(site.name, site.kind, type_name, "weight", tuple(layer.weight.shape)))
        if site.kind != "embedding":
            writer.gradient(site.name, site.kind, type_name)
    if site.kind == "embedding":
        return
    for role, source in zip(("input", "other"), site.inputs, strict=False):
        _operand_row(writer, site, type_name, role, serves.get(source, ""))
    name = writer.add(site.name, site.kind, type_name, "output") if site.kind != "linear" and used else ""
    if writer.complete(site.name, site.kind) and name:
        serves |= dict.fromkeys(site.nodes, name)


def _operand_row(writer: RowWriter, site: Site, type_name: str, role: str, shares: str) -> None:
    """An input row; the second operand of an add is decided like the first."""
    if role == "input":
        writer.add(site.name, site.kind, type_name, role, shares=shares)
        return
    scheme, rule, reason = writer.recipe.scheme_for(site.name, type_name, site.kind, "input")
    writer._append(site.name, site.kind, type_name, role, scheme, rule, reason, None, shares)


def _uncovered_row(node: fx.Node, modules: Mapping[str, nn.Module], writer: RowWriter) -> None:
    """A module with parameters that is no site and folds into none: listed as float."""
    module = modules[str(node.target)]
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, torch.Tensor) else None
    reason = (
        "called more than once" if type(module) in (*CONVOLUTIONS, nn.Linear) else "no integer kernel for this layer"
    )
    writer.leave(str(node.target), "other", type(module).__name__, "weight", reason, shape)


def prepare_graph(model: nn.Module, plan: Plan) -> fx.GraphModule:
    """A GraphModule around the model's parameters in which every planned site is a layer with quantizers."""
    graph_module = capture(model, *plan.example_inputs)
    modules, builder = dict(graph_module.named_modules()), Builder(plan)
    planned = {row.module for row in plan.rows if row.scheme is not None and row.role != "input"}
    for site in find_sites(graph_module, plan.recipe):
        if site.name not in planned:
            continue
        layer: Any = modules[str(site.node.target)] if site.node.op == "call_module" else None
        norm = modules[str(site.norm.target)] if site.norm is not None else None
        new = _build(site, layer, norm, builder.engine)
        builder.fill(new, site.name, getattr(layer, "weight", None) if site.kind != "pool" else None)
        _install(graph_module, site, new.train(graph_module.training))
    _free_layout(graph_module)
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def _free_layout(graph_module: fx.GraphModule) -> None:
    """Let convolutions lay activations in memory channels last while training: views become reshapes, outputs come as they would have."""
    for module in graph_module.modules():
        if isinstance(module, Conv):
            module.channels_last = True
    for node in graph_module.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
        elif node.op == "call_method" and node.target == "view" and not isinstance(node.args[1], torch.dtype):
            node.target = "reshape"
    graph_module.register_forward_hook(_contiguous)


def _contiguous(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Outputs of four dimensions in the order of their shape, as a float model gives them."""
    if not module.training:
        return output
    return pytree.tree_map(lambda y: y.contiguous() if isinstance(y, torch.Tensor) and y.ndim == 4 else y, output)


def _build(site: Site, layer: Any, norm: nn.Module | None, engine: str) -> nn.Module:
    if site.kind == "conv":
        return Conv(layer, norm, site.relu is not None, engine)
    if site.kind == "linear":
        return Linear(layer.weight, layer.bias, engine)
    if site.kind == "embedding":
        return Embedding(layer.weight, layer.padding_idx)
    return Add(site.relu is not None, engine) if site.kind == "add" else GlobalAveragePool(engine)


def _install(graph_module: fx.GraphModule, site: Site, new: nn.Module) -> None:
    """Call the new layer where the site's nodes stood; the folded nodes go (their modules stay for their parameters)."""
    graph, node = graph_module.graph, site.node
    if node.op == "call_module" and site.kind != "pool":
        replace_module(graph_module, site.name, new)
    else:
        graph_module.add_submodule(site.name, new)
    call = node
    if site.place is not node or node.op != "call_module" or site.kind == "pool":
        with graph.inserting_before(site.place):
            call = graph.call_module(site.name, tuple(site.inputs))
            call.meta = dict(node.meta)
    last = site.output
    if site.kind == "pool" and not keeps_dims(node):
        with graph.inserting_after(call):
            flat = graph.call_function(torch.flatten, (call, 1))
        last.replace_all_uses_with(flat)
    elif last is not call:
        last.replace_all_uses_with(call)
    for old in reversed(site.nodes):
        if old is not call and not old.users:
            graph.erase_node(old)

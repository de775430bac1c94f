"""From rows of a plan to quantizers in slots: shared by the two ways to reach a model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from qatana.errors import ModelError, SchemeError
from qatana.numerics import Scheme
from qatana.numerics.dynamic import at_run_time
from qatana.numerics.stochastic import check_gradient_scheme
from qatana.quantizer import Quantizer
from qatana.recipe import Plan, Recipe, Row

REQUIRED = {
    "linear": ("weight", "input"),
    "conv": ("weight", "input", "other", "output"),
    "add": ("input", "other", "output"),
    "pool": ("input", "output"),
    "attention": ("query", "key", "value", "probability", "context"),
}


@dataclass
class RowWriter:
    """Collects rows for a plan, asking the recipe about each tensor."""

    recipe: Recipe
    rows: list[Row] = field(default_factory=list)

    def add(
        self, module: str, kind: str, type_name: str, role: str, shape: tuple[int, ...] | None = None, shares: str = ""
    ) -> str:
        """Decide one tensor. Returns the name of the quantizer that serves it, "" if it stays float."""
        scheme, rule, reason = self.recipe.scheme_for(module, type_name, kind, role)
        return self._append(module, kind, type_name, role, scheme, rule, reason, shape, shares)

    def gradient(self, module: str, kind: str, type_name: str) -> None:
        """A row for the gradient of a layer's output, if a rule rounds it."""
        scheme, rule, reason = self.recipe.scheme_for(module, type_name, kind, "gradient")
        if scheme is not None:
            check_gradient_scheme(scheme)
            self.rows.append(Row(f"{module}.gradient", module, kind, type_name, "gradient", scheme, rule, reason))

    def complete(self, module: str, kind: str) -> bool:
        """An integer operator needs all of its tensors: if one stays float, so does the layer, and its rows say why. A free target
        quantizes each tensor on its own."""
        if self.recipe.resolved.free:
            return True
        rows = {row.role: (i, row) for i, row in enumerate(self.rows) if row.module == module}
        missing = [role for role in REQUIRED.get(kind, ()) if role in rows and rows[role][1].scheme is None]
        if not missing:
            return True
        reason = f"the integer operator needs {missing[0]} too, which stays float ({rows[missing[0]][1].rule})"
        for i, row in rows.values():
            if row.scheme is not None:
                self.rows[i] = replace(row, scheme=None, reason=reason, shares="", scales=0)
        return False

    def leave(
        self, module: str, kind: str, type_name: str, role: str, reason: str, shape: tuple[int, ...] | None
    ) -> None:
        """A tensor that stays float whatever the recipe says."""
        self._append(module, kind, type_name, role, None, "cannot", reason, shape, "")

    def _append(
        self, module: str, kind: str, type_name: str, role: str, scheme: Scheme | None, rule: str, reason: str,
        shape: tuple[int, ...] | None, shares: str,
    ) -> str:  # fmt: skip
        name = f"{module}.{role}" if module else role
        elements = scales = 0
        if shape is not None:
            elements = _product(shape)
            if scheme is not None:
                _check_weight(scheme, kind, name, rule, self.recipe.resolved.free)
                scheme.check(shape, name)
                scales = _product(scheme.granularity.scale_shape(shape))
        elif scheme is not None:
            _check_activation(scheme, name, rule, self.recipe.resolved.free)
            if (kind, role) in self.recipe.resolved.zero_point_0 and not (scheme.symmetric and scheme.zero_point == 0):
                raise SchemeError(
                    f"{name}: {self.recipe.target} multiplies two activations on integers only where their zero point is 0, "
                    f"not by '{scheme}': use a signed format and symmetric=True ({rule})"
                )
        shares = shares if scheme is not None else ""
        free = self.recipe.resolved.free
        self.rows.append(Row(name, module, kind, type_name, role, scheme, rule, reason, shares, elements, scales, free))
        return (shares or name) if scheme is not None else ""


def _check_weight(scheme: Scheme, kind: str, name: str, rule: str, free: bool) -> None:
    if scheme.granularity.kind == "token":
        raise SchemeError(
            f"{name}: a weight has no tokens, '{scheme}' belongs to activations: use granularity 'channel' or 'group32' ({rule})"
        )
    if not free and kind == "embedding" and scheme.granularity.kind not in ("channel", "group"):
        raise SchemeError(
            f"{name}: a table has scales per row ('channel') or per group, not '{scheme.granularity}' ({rule})"
        )


def _check_activation(scheme: Scheme, name: str, rule: str, free: bool) -> None:
    """Activations are per tensor, or quantized at run time: in the two ways that kernels know, on a free target in any way."""
    granularity, dynamic = scheme.granularity.kind, scheme.scale == "dynamic"
    if not dynamic and (granularity != "tensor" or not scheme.takes_scale):
        raise SchemeError(
            f"{name}: static activations have one calibrated scale per tensor, not '{scheme}'; use scale='dynamic' ({rule})"
        )
    if dynamic and not free and not at_run_time(scheme):
        raise SchemeError(
            f"{name}: activations quantized at run time are uint8 per tensor (symmetric=False) or int8n per group, "
            f"not {scheme.format} per {granularity} ({rule}); the target 'torch' takes any"
        )


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


class Builder:
    """Makes the quantizers of a plan, each once, and puts them into slots."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.engine = plan, plan.recipe.resolved.engine
        self.made: dict[str, Quantizer] = {}
        self.owned: set[str] = set()

    def quantizer(self, row: Row | None, shape: tuple[int, ...] | None = None) -> Quantizer | None:
        """The quantizer of a row (that of another row if it shares), or None where it stays float."""
        if row is None or row.scheme is None:
            return None
        name = row.shares or row.name
        if name not in self.made:
            source = self.plan.row(name) or row
            assert source.scheme is not None
            self.made[name] = Quantizer(source.scheme, shape, name, self.engine)
            self.made[name].lifted = (source.kind, source.role) in self.plan.recipe.resolved.lifted
        return self.made[name]

    def fill(self, layer: nn.Module, module: str, weight: Any = None) -> nn.Module:
        """Give a layer the quantizers of its rows: role "input" goes to slot input_quantizer, and so on.

        A quantizer is a submodule of the first layer that has it; layers that share it refer to it by a plain attribute. So a state_dict
        names each tensor once, and whatever saves one (save_pretrained, safetensors) takes it."""
        for role, row in self.plan.of_module(module).items():
            if role == "gradient":
                layer.gradient = row.scheme  # type: ignore[assignment]
                continue
            shape = tuple(weight.shape) if role == "weight" and weight is not None else None
            quantizer, slot = self.quantizer(row, shape), f"{role}_quantizer"
            if quantizer is None or quantizer.name not in self.owned:
                setattr(layer, slot, quantizer)
                self.owned |= {quantizer.name} if quantizer is not None else set()
            else:
                layer.__dict__[slot] = quantizer
        return layer


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module `name` stands."""
    parent, _, leaf = name.rpartition(".")
    if not leaf:
        raise ModelError("the model itself is a single layer; wrap it in torch.nn.Sequential")
    setattr(root.get_submodule(parent) if parent else root, leaf, new)


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and float buffers as float32, shared ones once."""
    seen = {id(t): t.numel() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    return 4 * sum(seen.values())

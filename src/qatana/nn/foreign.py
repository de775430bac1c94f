"""Layers that are not ours: their own forward, on quantized weights.

A Conv1D of GPT-2, a transposed convolution, experts as one 3-D parameter, a user's layer with a bare `nn.Parameter`: the float layer
keeps its forward, its parameters and their names, and `torch.func.functional_call` hands it the quantized weights. So every layer has
one arithmetic, in training and converted, and a new kind of layer needs a registration (`register_layer`), no class.

A weight is quantized as a *matrix*, one row per output, which its layout says how to reach:

    "out in"          (N, K, ...)       as it is: linear layers, convolutions
    "in out"          (K, N, ...)       the first two dimensions swapped: GPT-2's Conv1D, transposed convolutions
    "expert out in"   (E, N, K)         as (E * N, K): every expert has its own scales
    "expert in out"   (E, K, N)         both"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from qatana.errors import ModelError, nearest
from qatana.quantizer import Quantizer

LAYOUTS = ("out in", "in out", "expert out in", "expert in out")


def to_matrix(weight: Tensor, layout: str) -> Tensor:
    """The weight, one row per output."""
    experts = int(layout.startswith("expert"))
    if layout.endswith("in out"):
        weight = weight.transpose(experts, experts + 1)
    return weight.flatten(0, 1) if experts else weight


def from_matrix(matrix: Tensor, layout: str, shape: tuple[int, ...]) -> Tensor:
    """Back from `to_matrix` to the weight's shape."""
    experts, swapped = int(layout.startswith("expert")), layout.endswith("in out")
    if experts:
        matrix = matrix.reshape(shape[0], -1, matrix.shape[-1])
    return matrix.transpose(experts, experts + 1) if swapped else matrix


class Slot(nn.Module):
    """The place of the quantizers of one weight of a layer, and of what is multiplied by it.

    `weight` is the matrix to quantize; calling the slot gives the quantized weight in the layer's own shape. In a converted model
    `stored` holds the codes."""

    def __init__(self, owner: Foreign, name: str, layout: str) -> None:
        super().__init__()
        self._owner, self.parameter, self.layout = (owner,), name, layout
        self.shape = tuple(owner.float_weight(name).shape)
        self.weight_quantizer: Quantizer | None = None
        self.input_quantizer: Quantizer | None = None
        self.stored: nn.Module | None = None

    @property
    def weight(self) -> Tensor:
        """Contiguous, as codes are: products of matrices in another order of memory differ in their last bits."""
        return to_matrix(self._owner[0].float_weight(self.parameter), self.layout).contiguous()

    def parameter_itself(self) -> Tensor:
        """The weight in the layer's own shape: its parameter, or what a parametrization computes."""
        return self._owner[0].float_weight(self.parameter)

    def input(self, x: Tensor) -> Tensor:
        """What the weight is multiplied by, quantized."""
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def forward(self) -> Tensor:
        if self.stored is not None:
            return from_matrix(self.stored(), self.layout, self.shape)
        if self.weight_quantizer is None or not self.weight_quantizer.enabled:
            return self._owner[0].float_weight(self.parameter)
        return from_matrix(self.weight_quantizer(self.weight), self.layout, self.shape)


class Foreign(nn.Module):
    """A float layer with slots for its weights.

    source   the float layer; its parameters, buffers and children become this module's, under the same names
    weights  names of the parameters to quantize ("weight", "out_proj.weight") -> layout
    The forward is the float layer's own, on quantized weights, its first argument quantized if it has a single weight. A subclass may
    have another one: `self.weight_of(name)` is a quantized weight, `self.input_of(name, x)` what is multiplied by it, quantized.
    Raises: ModelError for a weight that the layer lacks, or an unknown layout."""

    def __init__(self, source: nn.Module, weights: Mapping[str, str]) -> None:
        super().__init__()
        self.training = source.training
        twin = _plain(source)
        self._parameters, self._buffers, self._modules = twin._parameters, twin._buffers, source._modules
        twin._modules = self._modules
        self._source = (twin,)
        slots = nn.ModuleDict()
        for name, layout in weights.items():
            _check(source, name, layout)
            slots[_key(name)] = Slot(self, name, layout)
        self.slots = slots

    def extra_repr(self) -> str:
        return f"{type(self._source[0]).__name__}: {', '.join(slot.parameter for slot in self._slots())}"  # type: ignore[misc]

    def float_weight(self, name: str) -> Tensor:
        """A float weight, or what its parametrization computes."""
        path, _, leaf = name.rpartition(".")
        module: Any = self.get_submodule(path) if path else self
        if "parametrizations" in module._modules and leaf in module.parametrizations:
            return module.parametrizations[leaf]()
        return getattr(module, leaf)

    def drop(self, name: str) -> None:
        """Forget a float weight whose codes a slot holds."""
        path, _, leaf = name.rpartition(".")
        module: Any = self.get_submodule(path) if path else self
        if leaf in module._parameters and not path:
            del module._parameters[leaf]
            self.__dict__[leaf] = self.slots[_key(name)].stored  # models ask a layer's weight for its dtype
        elif leaf in module._parameters:
            module._parameters[leaf] = None
        else:
            del module.parametrizations[leaf]

    def weight_of(self, name: str) -> Tensor:
        """A weight in the layer's own shape, quantized."""
        return self.slots[_key(name)]()

    def input_of(self, name: str, x: Tensor) -> Tensor:
        """What a weight is multiplied by, quantized."""
        slot: Any = self.slots[_key(name)]
        return slot.input(x)

    def __getattr__(self, name: str) -> Any:
        """What callers ask of the float layer (sizes, scales, flags) it answers itself."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_source" not in self.__dict__:
                raise
            return getattr(self._source[0], name)

    def train(self, mode: bool = True) -> Foreign:
        self._source[0].training = mode
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slots = self._slots()
        if len(slots) == 1 and slots[0].input_quantizer is not None:
            args, kwargs = _with_first(args, kwargs, slots[0].input)
        given: dict[str, Tensor] = {name: p for name, p in self._parameters.items() if p is not None}
        given.update((slot.parameter, slot()) for slot in slots)
        return functional_call(self._source[0], given, args, kwargs)

    def _slots(self) -> list[Any]:
        return list(self.slots.values())


def _key(name: str) -> str:
    return name.replace(".", "_")


def _check(source: nn.Module, name: str, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ModelError(f"unknown layout '{layout}' of weight '{name}'{nearest(layout, LAYOUTS)}")
    path, _, leaf = name.rpartition(".")
    module: Any = source.get_submodule(path) if path else source
    if not isinstance(getattr(module, leaf, None), Tensor):
        known = [n for n, p in source.named_parameters() if p.ndim > 1]
        raise ModelError(f"{type(source).__name__} has no parameter '{name}'{nearest(name, known)}")


def _plain(source: nn.Module) -> nn.Module:
    """The float layer without parametrizations: another object around the same tensors, whose weights may be given."""
    parametrized = parametrize.is_parametrized(source)
    cls: Any = type(source).__mro__[1] if parametrized else type(source)
    twin: nn.Module = cls.__new__(cls)
    twin.__dict__.update(source.__dict__)
    if parametrized:
        computed: Any = source.parametrizations
        twin._parameters = dict(source._parameters)
        twin._parameters |= {name: None for name in computed}
    return twin


def _with_first(args: tuple[Any, ...], kwargs: dict[str, Any], change: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first argument changed, however it was given."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = next(key for key, value in kwargs.items() if isinstance(value, torch.Tensor))
    return args, kwargs | {name: change(kwargs[name])}

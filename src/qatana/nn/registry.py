"""Which float layers are quantized, and how: one entry for each class. The only way to a new kind of layer.

register_layer(weights={"proj": "in out"})(TheirLayer)       a float class: its own forward on quantized weights

@register_layer(TheirLayer, weights={"up": "out in", "down": "out in"})
class QuantizedTheirLayer(Foreign): ...                      with a forward of its own, inputs quantized where it says so"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from qatana.errors import ModelError
from qatana.nn.conv import Conv
from qatana.nn.embedding import Embedding
from qatana.nn.experts import Experts, is_experts
from qatana.nn.foreign import Foreign
from qatana.nn.linear import Linear, SwappedLinear

T = TypeVar("T", bound=type[nn.Module])


@dataclass(frozen=True)
class LayerType:
    """How a class of float layers is quantized.

    kind     what rules and targets know it as: "linear", "conv", "embedding", "experts", or a name of the user's own
    weights  parameter -> layout (`nn.foreign`)
    inputs   whether what a weight is multiplied by has a quantizer too
    native   makes the layer that engines' kernels know, from (float layer, engine); None: its own forward on quantized weights
    foreign  makes that one, which the target "torch" can hold
    engines  makes the layer that engines' kernels know where the target "torch" keeps the layer's own forward"""

    kind: str
    weights: Mapping[str, str] = field(default_factory=lambda: {"weight": "out in"})
    inputs: bool = True
    native: Callable[[Any, str], nn.Module] | None = None
    foreign: Callable[[Any], Foreign] | None = None
    engines: Callable[[Any, str], nn.Module] | None = None

    @property
    def has_kernel(self) -> bool:
        """Whether engines compute it on integers."""
        return self.native is not None or self.engines is not None

    def module_of(self, name: str, parameter: str) -> str:
        """Name under which a plan lists a weight of the layer `name`: the layer's own, or the parameter's where there are several."""
        return (
            name if parameter == "weight" and len(self.weights) == 1 else f"{name}.{parameter}" if name else parameter
        )

    def build(self, source: nn.Module, engine: str, free: bool = True) -> nn.Module:
        """The layer with slots, for the target "torch" (free) or for an engine."""
        native = self.native if free or self.engines is None else self.engines
        if native is not None:
            return native(source, engine)
        return (self.foreign or (lambda layer: Foreign(layer, self.weights)))(source)


def _linear(source: Any, engine: str) -> nn.Module:
    return Linear(source.weight, source.bias, engine).train(source.training)


def _swapped(source: Any, engine: str) -> nn.Module:
    return SwappedLinear(source.weight, source.bias, engine).train(source.training)


def _conv(source: Any, engine: str) -> nn.Module:
    return Conv(source, None, False, engine).train(source.training)


def _embedding(source: Any, _: str) -> nn.Module:
    return Embedding(source.weight, source.padding_idx).train(source.training)


_SWAPPED = {"weight": "in out"}
_TYPES: dict[type[nn.Module], LayerType] = {
    nn.Linear: LayerType("linear", native=_linear),
    nn.Conv1d: LayerType("conv", native=_conv),
    nn.Conv2d: LayerType("conv", native=_conv),
    nn.Conv3d: LayerType("conv"),
    nn.ConvTranspose1d: LayerType("conv", _SWAPPED),
    nn.ConvTranspose2d: LayerType("conv", _SWAPPED),
    nn.ConvTranspose3d: LayerType("conv", _SWAPPED),
    nn.Embedding: LayerType("embedding", inputs=False, native=_embedding),
    nn.EmbeddingBag: LayerType("embedding", inputs=False),
    nn.MultiheadAttention: LayerType("linear", {"in_proj_weight": "out in", "out_proj.weight": "out in"}, inputs=False),
    nn.Bilinear: LayerType("linear", inputs=False),
}
_CONV = {"conv1d.weight": "out in"}
_BARE = {"gate_up_proj": "expert in out", "down_proj": "expert in out"}
_NAMES: dict[str, LayerType] = {
    "Conv1D": LayerType("linear", _SWAPPED, engines=_swapped),
    "*MambaMixer": LayerType("linear", {**_CONV, "dt_proj.weight": "out in"}, inputs=False),
    "*Mamba2Mixer": LayerType("linear", _CONV, inputs=False),
    "BambaMixer": LayerType("linear", _CONV, inputs=False),
    "*GatedDeltaNet": LayerType("linear", _CONV, inputs=False),
    "WavLMAttention": LayerType(
        "linear", {f"{part}_proj.weight": "out in" for part in ("q", "k", "v", "out")}, inputs=False
    ),
    "Llama4TextExperts": LayerType("experts", _BARE, inputs=False),
}
"""Classes of transformers by their names, since it may not be installed: GPT-2's layer, mixers that read the weights of their children
without calling them, experts that no experts function of transformers knows."""


def register_layer(
    replaces: type[nn.Module] | None = None, *, weights: Mapping[str, str] | None = None, kind: str = "linear"
) -> Callable[[T], T]:
    """Let `plan` and `prepare` quantize a class of layers: a decorator of the float class, or of its `Foreign` with `replaces`.

    weights  parameter -> layout: "out in" (N, K), "in out" (K, N), "expert out in" (E, N, K), "expert in out" (E, K, N).
             Default: {"weight": "out in"}
    kind     what rules and targets know it as; the target "torch" takes any
    A registration holds for subclasses too, and replaces an older one.
    Raises: ModelError for a `Foreign` that does not say what it replaces."""
    names = {"weight": "out in"} if weights is None else dict(weights)

    def register(cls: T) -> T:
        own_forward = issubclass(cls, Foreign)
        if own_forward and replaces is None:
            raise ModelError(
                f"{cls.__name__} replaces no float layer; write @register_layer(TheFloatLayer, weights=...)"
            )
        target: Any = replaces if own_forward else cls
        make: Any = (lambda source: cls(source, names)) if own_forward else None
        _TYPES[target] = LayerType(kind, names, own_forward or len(names) == 1, None, make)
        return cls

    return register


def layer_type(module: nn.Module) -> LayerType | None:
    """The entry that holds for a module: that of the nearest class among its bases.

    A subclass that has a forward of its own, and a layer whose weight is computed (weight normalization), keep their forward."""
    if is_experts(module):
        names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
        layout = "expert in out" if module.is_transposed else "expert out in"
        return LayerType("experts", dict.fromkeys(names, layout), foreign=Experts)
    for cls in type(module).__mro__:
        found = _TYPES.get(cls) or _of_transformers(cls)
        if found is not None:
            same = type(module).forward is cls.forward and not parametrize.is_parametrized(module)
            fits = same and (found.kind != "conv" or found.native is None or _is_plain(module))
            return found if fits else LayerType(found.kind, found.weights, found.inputs, None, found.foreign)
    return None


def _of_transformers(cls: type) -> LayerType | None:
    if not cls.__module__.startswith("transformers."):
        return None
    return next((entry for name, entry in _NAMES.items() if fnmatchcase(cls.__name__, name)), None)


def _is_plain(conv: Any) -> bool:
    """Whether a convolution has a form that engines compute: zeros around it, the same number on both sides."""
    even = conv.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return conv.padding_mode == "zeros" and not even

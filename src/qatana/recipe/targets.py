"""Targets: what each engine can execute in integers, and the scheme of every kind of tensor there.

Roles: weight, input, output of a layer; query, key, value, probability, context of attention. Layer kinds: linear,
conv, embedding, add, pool, attention, activation. A role that a target does not list stays float there; the free target, "torch",
takes any scheme for any role that a rule names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from inspect import getdoc

from qatana.errors import RecipeError, nearest
from qatana.numerics import Scheme, scheme

Key = tuple[str, str]
"""(layer kind, role)"""


@dataclass(frozen=True)
class Target:
    """One deployment engine and storage: the arithmetic it uses and the default scheme per (kind, role).

    lifted        asymmetric activations whose zero point stays above the lowest code, so that one formula holds for them
    zero_point_0  activations whose zero point must be 0: the engine runs their product in float otherwise
    fused_sums    a sum is part of the convolution that makes one of its operands, whose output is not rounded before
    free          no engine's kernels bind it: any scheme for any tensor, each on its own (weights alone, floats, blocks, a KV cache)"""

    name: str
    engine: str
    summary: str
    schemes: dict[Key, Scheme] = field(default_factory=dict)
    runtimes: tuple[str, ...] = ("onnxruntime",)
    lifted: frozenset[Key] = frozenset()
    zero_point_0: frozenset[Key] = frozenset()
    fused_sums: bool = False
    free: bool = False

    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.schemes}


_ACTIVATION = scheme("uint8", symmetric=False, range="mse")
_SIGNED = scheme("int8", symmetric=True, range="mse")
_PROBABILITY = scheme("uint8", symmetric=False, fixed=(1.0 / 255.0, 0))
_WEIGHT = scheme("int8n", "channel", scale="dynamic")
_TABLE = scheme("int8n", "channel", scale="dynamic")


def _static() -> dict[Key, Scheme]:
    act = _ACTIVATION
    return {
        ("linear", "weight"): _WEIGHT,
        ("linear", "input"): act,
        ("linear", "output"): act,
        ("conv", "weight"): _WEIGHT,
        ("conv", "input"): act,
        ("conv", "output"): act,
        ("add", "input"): act,
        ("add", "output"): act,
        ("pool", "input"): act,
        ("pool", "output"): act,
        ("activation", "output"): act,
        ("embedding", "weight"): _TABLE,
        ("attention", "query"): act,
        ("attention", "key"): act,
        ("attention", "value"): act,
        ("attention", "probability"): _PROBABILITY,
        ("attention", "context"): act,
    }


def _openvino() -> dict[Key, Scheme]:
    """As ONNX Runtime's, but zero point 0 around the products of attention, and no sums of their own."""
    signed = [("linear", "output"), *(("attention", role) for role in ("query", "key", "value", "context"))]
    return {key: s for key, s in _static().items() if key[0] != "add"} | dict.fromkeys(signed, _SIGNED)


def _blocks(weight: str, size: int, table: str, table_size: int) -> dict[Key, Scheme]:
    return {
        ("linear", "weight"): scheme(weight, f"group{size}", scale="learned", range="mse"),
        ("linear", "input"): scheme("int8n", f"group{size}", scale="dynamic"),
        ("embedding", "weight"): scheme(table, f"group{table_size}", scale="dynamic", range="minmax"),
    }


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "ort:int8",
            "onnxruntime",
            "static W8A8: uint8 activations, int8 weights per channel, integer kernels end to end",
            _static(),
            ("onnxruntime", "openvino"),
        ),
        Target(
            "ort:int8-dynamic",
            "onnxruntime",
            "int8 weights per channel, activations quantized per batch at run time",
            {
                ("linear", "weight"): _WEIGHT,
                ("linear", "input"): scheme("uint8", symmetric=False, scale="dynamic"),
                ("embedding", "weight"): _TABLE,
            },
        ),
        Target(
            "ort:int4",
            "onnxruntime",
            "4-bit weights in blocks of 32, int8 activations per block at run time (MatMulNBits)",
            _blocks("int4", 32, "int4", 32),
            ("onnxruntime", "openvino"),
        ),
        Target(
            "ort:int2",
            "onnxruntime",
            "2-bit weights in blocks of 64, int8 activations per block at run time (MatMulNBits)",
            _blocks("int2", 64, "int4", 128),
            ("onnxruntime", "openvino"),
        ),
        Target(
            "openvino:int8",
            "openvino",
            "static W8A8 by OpenVINO's arithmetic: uint8 activations, int8 ones in attention, int8 weights per channel",
            _openvino(),
            ("openvino",),
            lifted=frozenset({("linear", "input")}),
            zero_point_0=frozenset(("attention", role) for role in ("query", "key", "value")),
            fused_sums=True,
        ),
        Target(
            "torch",
            "onnxruntime",
            "any number format, for weights alone or with inputs and a KV cache; packed artifacts, run in PyTorch",
            {(kind, "weight"): _WEIGHT for kind in ("linear", "conv", "embedding", "experts")},
            (),
            free=True,
        ),
    )
}


def target(name: str) -> Target:
    """The target of that name. Raises: RecipeError naming the nearest one."""
    if name not in TARGETS:
        raise RecipeError(f"unknown target '{name}'{nearest(name, TARGETS)}")
    return TARGETS[name]


Changes = Mapping[Key, Scheme | str | None]


def register_target(name: str, *, base: str) -> Callable[[Callable[[], Changes]], Callable[[], Changes]]:
    """A target of your own: a decorator of a function that returns what is different from an existing one.

    name  how recipes call it: "npu:w4a8"
    base  the target whose engine computes it, and whose schemes hold where the function says nothing. "torch" is free: any scheme for any
          tensor, packed artifacts that run in PyTorch; another one exports what its own exporter can write
    The function returns {(layer kind, role): scheme}, None for a tensor that stays float; its docstring is the summary.
    Raises: RecipeError for an unknown base or a name that is taken; SchemeError for an unknown scheme."""
    found = target(base)

    def register(changes: Callable[[], Changes]) -> Callable[[], Changes]:
        if name in TARGETS and TARGETS[name].summary != _summary(changes):
            raise RecipeError(f"the target '{name}' exists already; take another name")
        given = {key: scheme(value) if isinstance(value, str) else value for key, value in changes().items()}
        merged = {key: value for key, value in {**found.schemes, **given}.items() if value is not None}
        TARGETS[name] = replace(found, name=name, summary=_summary(changes), schemes=merged)
        return changes

    return register


def _summary(function: Callable[[], Changes]) -> str:
    return (getdoc(function) or "").partition("\n")[0]

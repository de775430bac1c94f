"""Combinations that cannot exist, refused with the reason when a scheme is made."""

from __future__ import annotations

from typing import Protocol

from qatana.errors import SchemeError, nearest
from qatana.numerics.formats import Codebook, FloatFormat, Format, GgufFormat, IntFormat
from qatana.numerics.granularity import Granularity
from qatana.numerics.scales import ScaleType


class Scheme(Protocol):
    """What the checks look at of a `qatana.numerics.Scheme`."""

    @property
    def format(self) -> Format: ...
    @property
    def granularity(self) -> Granularity: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def scale(self) -> str: ...
    @property
    def fixed(self) -> tuple[float, int] | None: ...
    @property
    def scale_type(self) -> ScaleType: ...
    @property
    def rule(self) -> str: ...
    @property
    def takes_scale(self) -> bool: ...


RULES = (
    "torchao", "compressed-tensors", "gptq", "awq", "bitsandbytes", "quanto", "absmean", "absmean:reciprocal", "hqq", "hqq:round",
)  # fmt: skip
SEARCHES = {"hqq": 60, "hqq:round": 60, "gguf:q4_k": 70, "gguf:q5_k": 60, "gguf:q6_k": 30}
"""Formats whose parameters are searched for, and about how many times as long as a copy of the tensor that takes on one thread."""


def refuse_impossible(scheme: Scheme) -> None:
    """Raise SchemeError with the reason and the remedy."""
    if scheme.granularity.kind == "token" and scheme.scale != "dynamic":
        raise SchemeError("per-token scales belong to activations and are dynamic: set scale='dynamic'")
    for check in (_integers, _symmetric_formats, _rules, _scale_types, _gguf, _given_scales, _fixed):
        check(scheme)


def _integers(scheme: Scheme) -> None:
    format = scheme.format
    if not isinstance(format, IntFormat):
        return
    if format.narrow and not scheme.symmetric:
        raise SchemeError("a narrow format has no room for a zero point: use symmetric=True or drop the 'n'")
    if str(format) in ("int1", "uint1") and scheme.symmetric:
        raise SchemeError(
            f"{format} has nothing above its zero point, so no symmetric scale: use symmetric=False, 'binary' for "
            f"{{-1, +1}} or 'int2n' for {{-1, 0, 1}}"
        )


def _symmetric_formats(scheme: Scheme) -> None:
    if not scheme.symmetric and not isinstance(scheme.format, IntFormat):
        raise SchemeError(f"{scheme.format} is symmetric about 0 and has no zero point: drop symmetric=False")


def _scale_types(scheme: Scheme) -> None:
    name, format, kind = scheme.scale_type.name, scheme.format, scheme.granularity.kind
    if scheme.scale_type.rule == "reciprocal" and not isinstance(format, FloatFormat):
        raise SchemeError(f"{scheme.scale_type} scales belong to float formats, not to {format}: use '{name}'")
    if name == "e4m3":
        if not isinstance(format, FloatFormat):
            raise SchemeError(
                f"e4m3 block scales belong to float formats (NVFP4), not to {format}: use float16 or float32"
            )
        if kind != "group":
            raise SchemeError(
                f"e4m3 scales are per group with one float32 scale per tensor, not per {kind}: use 'group16'"
            )
    if name == "double":
        if not isinstance(format, Codebook) or str(format) == "binary":
            raise SchemeError(f"doubly quantized scales belong to bitsandbytes' codebooks (nf4, fp4), not to {format}")
        if kind not in ("flat", "group"):
            raise SchemeError(f"doubly quantized scales need many blocks, not one per {kind}: use 'flat64'")
    if name == "e8m0" and scheme.scale_type.rule in ("even", "rceil") and not isinstance(format, FloatFormat):
        raise SchemeError(
            f"the e8m0 rule '{scheme.scale_type.rule}' looks at the mantissa of a float format, which {format} has not: "
            f"use 'e8m0:floor' or 'e8m0:ceil'"
        )


def _given_scales(scheme: Scheme) -> None:
    """A learned scale needs to be a number of its own; what is searched for is not searched for at each call."""
    copies = SEARCHES.get(scheme.rule or str(scheme.format))
    if scheme.scale == "dynamic" and copies:
        raise SchemeError(
            f"the parameters of {scheme.rule or scheme.format} are found by a search that costs about {copies} copies of the "
            f"tensor: too much for each step; hold them: scale='static'"
        )
    if scheme.scale == "dynamic":
        return
    if scheme.scale == "learned" and not scheme.takes_scale:
        raise SchemeError(
            f"the scales of {scheme.format} with {scheme.rule or scheme.scale_type} follow from the tensor's own values and "
            f"cannot be learned: set scale='static' (solved once, then held)" + " or scale='dynamic'" * (not copies)
        )
    if scheme.granularity.kind == "flat" and scheme.granularity.size == 0:
        raise SchemeError("flat blocks need a size: write 'flat64'")
    if (
        scheme.scale == "learned"
        and scheme.scale_type.name == "e8m0"
        and scheme.scale_type.rule not in ("floor", "ceil")
    ):
        raise SchemeError(
            "a learned e8m0 scale must be rounded to a power of two: say how, scale_type='e8m0:floor' or 'e8m0:ceil'"
        )


def _rules(scheme: Scheme) -> None:
    if not scheme.rule:
        return
    if scheme.rule not in RULES:
        raise SchemeError(f"unknown rule '{scheme.rule}'{nearest(scheme.rule, RULES)}")
    if not isinstance(scheme.format, IntFormat):
        raise SchemeError(f"rule '{scheme.rule}' is one of integer formats, not of {scheme.format}")
    if scheme.rule.startswith("absmean") and str(scheme.format) != "int2n":
        raise SchemeError(
            f"rule '{scheme.rule}' is BitNet's for ternary weights: use the format 'int2n', not '{scheme.format}'"
        )
    if scheme.rule == "bitsandbytes" and not (scheme.symmetric and scheme.format.signed):
        raise SchemeError("rule 'bitsandbytes' divides by the largest magnitude: use 'int8n' and symmetric=True")
    if scheme.rule == "quanto" and (scheme.symmetric or scheme.format.signed):
        raise SchemeError(
            "rule 'quanto' counts codes up from a block's smallest value: use 'uint4' and symmetric=False"
        )
    if scheme.rule.startswith("hqq") and (
        scheme.symmetric or scheme.format.signed or scheme.granularity.kind not in ("group", "channel")
    ):
        raise SchemeError(
            "rule 'hqq' has a float zero point per group: use an unsigned format, symmetric=False, 'group64'"
        )
    if scheme.rule == "compressed-tensors" and scheme.scale_type.name == "e8m0":
        raise SchemeError(f"rule '{scheme.rule}' stores float32, float16 or bfloat16 scales, not {scheme.scale_type}")
    other = ("torchao", "compressed-tensors", "gptq", "awq", "")
    if scheme.rule not in other and scheme.scale_type.name != "float32":
        raise SchemeError(f"rule '{scheme.rule}' stores float32 scales, not {scheme.scale_type}")


def _gguf(scheme: Scheme) -> None:
    format = scheme.format
    if not isinstance(format, GgufFormat):
        return
    if scheme.granularity.kind != "group" or scheme.granularity.size != format.block:
        raise SchemeError(
            f"{format} has blocks of {format.block} elements by definition, not '{scheme.granularity}': use 'group{format.block}'"
        )
    if scheme.scale_type.name != "float32":
        raise SchemeError(f"{format} fixes its own scale type; drop scale_type='{scheme.scale_type}'")


def _fixed(scheme: Scheme) -> None:
    if scheme.fixed is None:
        return
    format = scheme.format
    if not isinstance(format, IntFormat):
        raise SchemeError(f"fixed parameters are for integer formats (a softmax output), not for {format}")
    if not scheme.takes_scale:
        raise SchemeError(f"fixed parameters are a scale and a zero point, which rule '{scheme.rule}' does not take")
    if not (scheme.fixed[0] > 0 and format.lo <= scheme.fixed[1] <= format.hi):
        raise SchemeError(f"fixed parameters {scheme.fixed} need scale > 0 and a zero point within {format}")

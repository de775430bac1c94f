"""The short names of schemes: `scheme("mxfp4", rule="rceil")`, `scheme("fp8:e4m3/token")`, `scheme("nf4+double")`."""

from __future__ import annotations

from dataclasses import dataclass

from qatana.errors import SchemeError
from qatana.numerics.formats import GgufFormat, parse_format
from qatana.numerics.granularity import Granularity
from qatana.numerics.scales import ScaleType
from qatana.numerics.scheme import RangeName, ScaleMode, Scheme
from qatana.numerics.scheme_checks import SEARCHES


@dataclass(frozen=True)
class _Name:
    """What a short name stands for; `variants` are the formats that may follow a colon, the first is the default."""

    variants: tuple[str, ...]
    granularity: str
    scale_type: str = "float32"
    rule: str = ""
    scale: ScaleMode = "dynamic"


NAMES = {
    "mxfp8": _Name(("e4m3", "e5m2"), "group32", "e8m0:floor"),
    "mxfp6": _Name(("e2m3", "e3m2"), "group32", "e8m0:floor"),
    "mxfp4": _Name(("e2m1",), "group32", "e8m0:floor"),
    "nvfp4": _Name(("e2m1",), "group16", "e4m3"),
    "fp8": _Name(("e4m3", "e5m2"), "tensor", scale="static"),
    "fp6": _Name(("e2m3", "e3m2"), "tensor", scale="static"),
    "nf4": _Name(("nf4",), "flat64"),
    "fp4": _Name(("fp4",), "flat64"),
    "dynamic8": _Name(("dynamic8",), "flat256"),
    "bitnet": _Name(("int2n",), "tensor", rule="absmean"),
    "binary": _Name(("binary",), "channel"),
    "hqq8": _Name(("uint8",), "group64", rule="hqq", scale="static"),
    "hqq4": _Name(("uint4",), "group64", rule="hqq", scale="static"),
    "hqq3": _Name(("uint3",), "group64", rule="hqq", scale="static"),
    "hqq2": _Name(("uint2",), "group64", rule="hqq", scale="static"),
    "compressed-tensors": _Name(
        ("int4", "int8", "int2", "int3", "int5", "int6", "int7"), "group128", rule="compressed-tensors"
    ),
}


def scheme(
    name: str,
    granularity: str = "",
    *,
    group: int | None = None,
    symmetric: bool | None = None,
    scale: ScaleMode | None = None,
    range: RangeName = "minmax",
    fixed: tuple[float, int] | None = None,
    scale_type: str | None = None,
    rule: str | None = None,
) -> Scheme:
    """A scheme from its written parts.

    name         "<format or short name>[:variant][+double][/granularity]": "int8", "uint4/group32", "mxfp8:e5m2", "nf4+double",
                 "fp8:e4m3/token", "gguf:q4_0", "compressed-tensors:int4" (its W4A16); or everything that `str(scheme)` writes
    granularity  "tensor" (default), "channel", "token", "group32", "block16x32", "flat64";  group=32 says "group32"
    rule         of the scale type where that has one ("floor", "ceil", "even", "rceil"; "cpu" for double; "compressed-tensors" for
                 nvfp4), else of the format

    `scheme("int4", group=128, symmetric=False)`, `scheme("uint8", symmetric=False)`, `scheme("mxfp4", rule="rceil")`.
    Raises: SchemeError for unknown names and impossible combinations."""
    if " " in name:
        return Scheme.parse(name)
    name, _, written = name.partition("/")
    name, _, extra = name.partition("+")
    parts = _parts(name)
    granularity = _granularity(granularity, written, group, parts.granularity)
    if extra and extra != "double":
        raise SchemeError(f"unknown part '+{extra}' of a scheme's name; known: '+double' (nf4, fp4)")
    kept = ScaleType.parse(scale_type or ("double" if extra else parts.scale_type))
    if rule is not None and kept.name in ("e8m0", "e4m3", "double"):
        kept, rule = ScaleType(kept.name, rule), None
    if scale is None:
        scale = "dynamic" if written == "token" else parts.scale
    rule = parts.rule if rule is None else rule
    asymmetric = symmetric is False or (symmetric is None and rule == "hqq")
    return Scheme(
        parse_format(parts.variants[0]), Granularity.parse(granularity), not asymmetric, scale, range, fixed, kept, rule
    )


def _parts(name: str) -> _Name:
    base, _, variant = name.partition(":")
    if base == "gguf":
        format = parse_format(name)
        assert isinstance(format, GgufFormat)
        return _Name((name,), f"group{format.block}", scale="static" if str(format) in SEARCHES else "dynamic")
    if base not in NAMES:
        return _Name((name,), "tensor", scale="static")
    known = NAMES[base]
    if not variant:
        return known
    if variant not in known.variants:
        raise SchemeError(
            f"'{base}' has no variant '{variant}'; write {' or '.join(f'{base}:{v}' for v in known.variants)}"
        )
    return _Name((variant,), known.granularity, known.scale_type, known.rule, known.scale)


def _granularity(given: str, written: str, group: int | None, default: str) -> str:
    said = [text for text in (given, written, f"group{group}" if group is not None else "") if text]
    if len(set(said)) > 1:
        raise SchemeError(f"two granularities, '{said[0]}' and '{said[1]}': say one")
    return said[0] if said else default

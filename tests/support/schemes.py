"""Every scheme that the laws are held to: formats x granularities x scale types x rules, and those with a name of their own."""

from __future__ import annotations

import torch

from qatana.numerics import Scheme, scheme
from qatana.numerics.gguf import GRIDS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = ["int8", "int4", "int3", "int8n", "int2n", "uint8", "uint5", "uint1", "int1"]
RULES = ["", "torchao", "compressed-tensors", "gptq", "awq"]
GRANULARITIES = ["tensor", "channel", "channel1", "token", "group32", "block4x64", "flat48"]
FLOATS = [
    "e4m3",
    "e5m2",
    "e2m3",
    "e3m2",
    "e2m1",
    "float(3,2)fn",
    "float(5,7)ieee",
    "float(2,5)",
    "nf4",
    "fp4",
    "dynamic8",
]
SCALE_TYPES = ["float32", "float16", "bfloat16", "e8m0:floor", "e8m0:ceil"]
MX = ["mxfp8", "mxfp8:e5m2", "mxfp6", "mxfp6:e3m2", "mxfp4"]
NAMED = [
    *(scheme(name, rule=rule) for name in MX for rule in ("floor", "ceil", "even", "rceil")),
    *map(scheme, ["nvfp4", "nf4", "fp4", "nf4+double", "fp4+double", "dynamic8", "bitnet", "binary", "hqq4", "hqq2"]),
    scheme("nf4+double", rule="cpu"),
    scheme("nvfp4", rule="compressed-tensors"),
    *map(
        Scheme.parse,
        [
            "int8n/channel sym dynamic rule=bitsandbytes", "int8n/token sym dynamic rule=bitsandbytes",
            "uint4/group32 asym dynamic rule=quanto", "uint2/channel asym dynamic rule=quanto",
            "int2n/tensor sym dynamic rule=absmean:reciprocal", "e4m3/channel sym dynamic float32:reciprocal",
            "e4m3/tensor sym dynamic float32:reciprocal", "e4m3/group32 sym dynamic e8m0:reciprocal",
        ],
    ),
    *(scheme(f"gguf:{name}") for name in sorted(GRIDS) if not name.startswith("q6") and not name.endswith("_k")),
]  # fmt: skip


def integer_scheme(format: str, granularity: str, symmetric: bool, scale_type: str, rule: str) -> Scheme:
    """The nearest scheme that exists: narrow formats are symmetric, one bit is not, compressed-tensors has no powers of two."""
    narrow, one = format.endswith("n"), format in ("int1", "uint1")
    return Scheme.from_dict(
        {
            "format": format,
            "granularity": granularity,
            "symmetric": (symmetric or narrow) and not one,
            "scale": "dynamic",
            "scale_type": scale_type,
            "rule": "" if rule == "compressed-tensors" and scale_type.startswith("e8m0") else rule,
        }
    )


def float_scheme(format: str, granularity: str, scale_type: str) -> Scheme:
    return Scheme.from_dict(
        {"format": format, "granularity": granularity, "scale": "dynamic", "scale_type": scale_type}
    )

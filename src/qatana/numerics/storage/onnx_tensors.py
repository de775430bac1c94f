"""raw_data of ONNX tensors narrower than a numpy type: one dense bit stream through the flattened tensor, lowest bits first.

Rows do not begin on bytes: a (3, 3) int4 tensor takes 5 bytes. Reference: onnx.proto3, TensorProto (int4 since opset 21,
float4e2m1 23, float8e8m0 24, int2 25, float6 28)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qatana.errors import SchemeError, nearest
from qatana.numerics.formats import IntFormat
from qatana.numerics.packing import pack, unpack

ELEMENTS: dict[str, IntFormat] = {
    **{name: IntFormat.parse(name) for name in ("int8", "uint8", "int4", "uint4", "int2", "uint2")},
    **{name: IntFormat(8, signed=False) for name in ("float8e4m3fn", "float8e5m2", "float8e8m0")},
    **{name: IntFormat(6, signed=False) for name in ("float6e2m3", "float6e3m2")},
    "float4e2m1": IntFormat(4, signed=False),
}
"""Element types by their name in onnx.proto3, lower case, and how their codes lie in bits (floats: bit patterns)."""


def pack_onnx(codes: Tensor, element: str) -> Tensor:
    """raw_data, (ceil(numel * bits / 8)) uint8, of codes of any shape.

    Raises: SchemeError for an unknown element type or a code out of range."""
    return pack(codes.flatten().to(torch.int16), _element(element))


def unpack_onnx(raw: Tensor, element: str, shape: tuple[int, ...]) -> Tensor:
    """Codes of `shape` (int8 for signed integers, uint8 for the rest). Raises: SchemeError if the bytes are too few or too many."""
    return unpack(raw, math.prod(shape), _element(element)).reshape(shape)


def _element(name: str) -> IntFormat:
    if name not in ELEMENTS:
        raise SchemeError(f"unknown ONNX element type '{name}'{nearest(name, ELEMENTS)}")
    return ELEMENTS[name]

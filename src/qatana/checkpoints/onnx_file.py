"""ONNX files: weights behind DequantizeLinear, MatMulNBits and GatherBlockQuantized, whoever wrote them; tables that qatana's files
gather as codes, with a scale for each row under the name of the table.

DequantizeLinear        (code - zero point) * scale, per tensor, axis or block          any standard element type
MatMulNBits, GatherBlockQuantized    the same in blocks along the inputs, codes of 2, 4 or 8 bits; zero point 2^(bits-1) if none"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatana.checkpoints.checkpoint import Checkpoint, Stored
from qatana.checkpoints.layers import explained
from qatana.errors import ArtifactError, SchemeError, require
from qatana.numerics import IntFormat, Parameters, scheme, unpack

ELEMENTS = {
    **{name.upper(): name for name in ("int8", "uint8", "int4", "uint4", "int2", "uint2")},
    "FLOAT8E4M3FN": "e4m3", "FLOAT8E5M2": "e5m2", "FLOAT4E2M1": "e2m1",
}  # fmt: skip
"""Element types of quantized weights, and the formats that they are."""


def read_onnx(path: Path) -> Checkpoint:
    """Weights under the names of their initializers; MatMulNBits' as (outputs, inputs), as PyTorch's linear layers have them.

    Weights that only MatMulInteger, ConvInteger or QLinear operators read are refused: their scale is no property of the tensor."""
    onnx = require("onnx", "onnx")
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's DecodeError, OSError and ValueError of external data ...
        raise ArtifactError(f"{path} is truncated or not ONNX ({error}); export or copy it again") from error
    tensors = {t.name: t for t in model.graph.initializer}
    weights: dict[str, Stored] = {}
    floats: dict[str, Tensor] = {}
    used: set[str] = set()
    for node in model.graph.node:
        reader = READERS.get(node.op_type)
        name = "".join(node.input[1:2]) if node.op_type == "MatMulNBits" else node.input[0] if node.input else ""
        if reader is None or name not in tensors:
            continue
        with explained(name):
            _keep(name, reader(onnx, node, tensors), weights, floats)
        used |= set(node.input)
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    tables = {name: f"{name}_scale" for name in rest if f"{name}_scale" in rest and len(rest[name].dims) == 2}
    for name, tensor in rest.items():
        if name not in tables.values():
            with explained(name):
                _keep(name, _table(onnx, name, rest) if name in tables else _plain(onnx, tensor), weights, floats)
    return Checkpoint("onnx", weights, floats)


def _keep(name: str, found: Stored | Tensor, weights: dict[str, Stored], floats: dict[str, Tensor]) -> None:
    if isinstance(found, Stored):
        weights[name] = found
    else:
        floats[name] = found


def _plain(onnx: Any, tensor: Any) -> Tensor:
    """A tensor that is no quantized weight; element types that numpy lacks become float32."""
    array = onnx.numpy_helper.to_array(tensor)
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    if kind in ELEMENTS and array.ndim > 1:
        raise SchemeError(
            f"{kind.lower()} behind no DequantizeLinear: no scale belongs to it; write the file in QDQ form"
        )
    return torch.from_numpy(np.array(array if array.dtype.isbuiltin == 1 else array.astype(np.float32)))


def _table(onnx: Any, name: str, tensors: dict[str, Any]) -> Stored:
    """int8 codes (rows, n) with a scale for each row."""
    array, scale = (onnx.numpy_helper.to_array(tensors[key]) for key in (name, f"{name}_scale"))
    if array.dtype != np.int8 or scale.size != array.shape[0]:
        raise SchemeError(f"'{name}_scale' does not belong to it: a table is int8, with a scale for each row")
    scales = torch.from_numpy(np.array(scale, dtype=np.float32)).reshape(-1)
    return _stored("int8", torch.from_numpy(np.array(array)), scales, torch.zeros_like(scales), 0, 0)


def _dequantize_linear(onnx: Any, node: Any, tensors: dict[str, Any]) -> Stored | Tensor:
    """A weight; an int32 bias comes as the float tensor that it stands for."""
    given = [_input(onnx, node, tensors, i) for i in range(3)]
    kind = onnx.TensorProto.DataType.Name(tensors[node.input[0]].data_type)
    attributes = _attributes(onnx, node)
    axis, block = int(attributes.get("axis", 1)), int(attributes.get("block_size", 0))
    if given[1] is None:
        raise SchemeError("its scale is computed in the graph (two levels), and is no number of the file")
    scale = torch.from_numpy(np.array(given[1], dtype=np.float32))
    if kind == "INT32":
        return torch.from_numpy(np.array(given[0])).double().mul(scale.double()).float()
    if kind not in ELEMENTS:
        raise SchemeError(f"element type {kind.lower()} is none of {', '.join(sorted(e.lower() for e in ELEMENTS))}")
    codes = _codes(given[0], kind)
    zero = torch.zeros_like(scale) if given[2] is None else _codes(given[2], kind).float().reshape(scale.shape)
    return _stored(ELEMENTS[kind], codes, scale, zero, axis % max(1, codes.ndim), block)


def _stored(format: str, codes: Tensor, scale: Tensor, zero: Tensor, axis: int, block: int) -> Stored:
    if format.startswith("e"):
        zero = torch.zeros_like(scale)  # a float's zero point is the float 0
    symmetric = not bool(zero.any())
    if block:
        turned = axis != codes.ndim - 1
        if turned and codes.ndim != 2:
            raise SchemeError(
                f"blocks along axis {axis} of {codes.ndim} are not supported: they lie along the last one"
            )
        parts = [t.t().contiguous() if turned else t for t in (codes, scale, zero)]
        found = _of(format, f"group{block}", symmetric, parts[0], parts[1].unsqueeze(-1), parts[2].unsqueeze(-1))
        return replace(found, shape=tuple(codes.shape), transposed=True) if turned else found
    if scale.numel() == 1:
        return _of(format, "tensor", symmetric, codes, scale.reshape(()), zero.reshape(()))
    shape = tuple(n if d == axis else 1 for d, n in enumerate(codes.shape))
    return _of(format, f"channel{axis or ''}", symmetric, codes, scale.reshape(shape), zero.reshape(shape))


def _of(format: str, granularity: str, symmetric: bool, codes: Tensor, scale: Tensor, zero: Tensor) -> Stored:
    found = scheme(format, granularity, symmetric=symmetric)
    if found.zero_point and symmetric:  # unsigned with zero point 0: the range begins there
        found = scheme(format, granularity, symmetric=False)
    return Stored.of(found, codes, Parameters(scale, zero, scale), torch.float32)


def _matmul_nbits(onnx: Any, node: Any, tensors: dict[str, Any]) -> Stored:
    attributes = _attributes(onnx, node)
    rows, columns, bits = (int(attributes[name]) for name in ("N", "K", "bits"))
    packed, scale, zero = (_input(onnx, node, tensors, i) for i in (1, 2, 3))
    if len(node.input) > 4 and node.input[4]:
        raise SchemeError("activation ordering (g_idx) is not supported; quantize the model without it")
    return _blocks(packed, scale, zero, (rows, columns), bits, int(attributes["block_size"]))


def _gather(onnx: Any, node: Any, tensors: dict[str, Any]) -> Stored:
    attributes = _attributes(onnx, node)
    bits, block = int(attributes.get("bits", 4)), int(attributes.get("block_size", 128))
    packed, scale, zero = (_input(onnx, node, tensors, i) for i in (0, 2, 3))
    if packed is None or packed.dtype != np.uint8 or scale is None:
        raise SchemeError("a table of GatherBlockQuantized is read where its codes are packed in uint8")
    return _blocks(packed, scale, zero, (packed.shape[0], packed.shape[-1] * 8 // bits), bits, block)


def _blocks(packed: Any, scale: Any, zero: Any, shape: tuple[int, int], bits: int, block: int) -> Stored:
    """Codes of `bits` packed along rows of `shape`, a scale for each `block` of them."""
    rows, columns = shape
    if packed is None or scale is None:
        raise SchemeError("its codes or scales are computed in the graph, and are no numbers of the file")
    if columns % block:
        raise SchemeError(
            f"blocks of {block} hang over rows of {columns}; quantize with a block size that divides them"
        )
    count, format = columns // block, IntFormat(bits, signed=False)
    codes = unpack(torch.from_numpy(np.array(packed)).reshape(rows, -1), columns, format)
    scales = torch.from_numpy(np.array(scale, dtype=np.float32)).reshape(rows, count, 1)
    if zero is None:
        signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
        return _of(f"int{bits}", f"group{block}", True, signed, scales, torch.zeros_like(scales))
    if zero.dtype != np.uint8:
        raise SchemeError("zero points that are floats are not supported; quantize with integer ones")
    zeros = torch.from_numpy(np.array(zero)).reshape(rows, math.ceil(count * bits / 8))
    return _of(f"uint{bits}", f"group{block}", False, codes, scales, unpack(zeros, count, format).float().unsqueeze(-1))


def _input(onnx: Any, node: Any, tensors: dict[str, Any], index: int) -> Any:
    """The array of an input that is an initializer, or None."""
    name = node.input[index] if index < len(node.input) else ""
    return onnx.numpy_helper.to_array(tensors[name]) if name in tensors else None


def _codes(array: Any, kind: str) -> Tensor:
    """int8 or uint8, one code to a byte: numbers of integers, bit patterns of floats."""
    if kind.startswith("FLOAT"):
        return torch.from_numpy(np.array(array).view(np.uint8).copy())
    return torch.from_numpy(np.array(array).astype(np.uint8 if kind.startswith("U") else np.int8))


def _attributes(onnx: Any, node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


READERS = {"DequantizeLinear": _dequantize_linear, "MatMulNBits": _matmul_nbits, "GatherBlockQuantized": _gather}

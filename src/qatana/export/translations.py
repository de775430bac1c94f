"""One ONNX translation per integer operator: the graph pattern that ONNX Runtime and OpenVINO fuse into an integer kernel.

Codes are uint8 or int8 tensors between the nodes; each pattern is DequantizeLinear -> float operator -> QuantizeLinear, which engines
recognise by its shape. What they compute then is the formula of numerics/engine.py (measured; see docs/numerics.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from qatana.errors import require
from qatana.export import microsoft

OPSET = 21
OPENVINO = "openvino"
"""Name of the engine whose files have float biases and no reshape around a linear layer."""


def _op() -> Any:
    return require("onnxscript", "onnx").opset21


def _const(value: Any, dtype: Any) -> Any:
    """A constant of an exact dtype (a Python float would lose which float32 it was only if it were not one)."""
    onnx = require("onnx", "onnx")
    return _op().Constant(value=onnx.numpy_helper.from_array(np.asarray(value, dtype=dtype)))


def _code_type(lo: int) -> Any:
    return np.int8 if lo < 0 else np.uint8


def _zero(codes: Any, zero_point: int) -> Any:
    """A zero point constant of the type of the codes."""
    signed = "INT8" in str(codes.dtype) and "UINT8" not in str(codes.dtype)
    return _const(zero_point, np.int8 if signed else np.uint8)


def _quantize(x: Any, scale: float, zero_point: int, lo: int, hi: int, engine: str) -> Any:
    """QuantizeLinear, with a Clip where the format is narrower than its 8-bit container: on the codes, for OpenVINO on the floats (a
    node between QuantizeLinear and DequantizeLinear would keep it from running the next operator on integers)."""
    op, kind = _op(), _code_type(lo)
    full = np.iinfo(kind)
    narrow = (lo, hi) != (full.min, full.max)
    if narrow and engine == OPENVINO:
        x = op.Clip(x, *(_const(np.float32(scale) * np.float32(end - zero_point), np.float32) for end in (lo, hi)))
    codes = op.QuantizeLinear(x, _const(scale, np.float32), _const(zero_point, kind))
    if narrow and engine != OPENVINO:
        codes = op.Clip(codes, _const(lo, kind), _const(hi, kind))
    return codes


def _dequantize(codes: Any, scale: float, zero_point: int) -> Any:
    return _op().DequantizeLinear(codes, _const(scale, np.float32), _zero(codes, zero_point))


def quantize(x, scale: float, zero_point: int, lo: int, hi: int, engine: str, name: str):
    """QuantizeLinear."""
    return _quantize(x, scale, zero_point, lo, hi, engine)


def dequantize(codes, scale: float, zero_point: int):
    """DequantizeLinear."""
    return _dequantize(codes, scale, zero_point)


def _gemm(
    codes: Any, x_scale: float, x_zero_point: int, weight: Any, weight_scale: Any, bias: Any, engine: str
) -> tuple[Any, Any]:
    """Reshape -> DQ -> Gemm with weight and int32 bias behind DQ (2-D); and the shape that the result returns to."""
    op = _op()
    rank = len(codes.shape)
    shape = None
    if rank != 2:
        shape = op.Concat(op.Shape(codes, start=0, end=rank - 1), _const([weight.shape[0]], np.int64), axis=0)
        codes = op.Reshape(codes, _const([-1, weight.shape[1]], np.int64))
    x = _dequantize(codes, x_scale, x_zero_point)
    w, b = _constants(weight, weight_scale, bias, x_scale, engine)
    return op.Gemm(x, w, *b, transB=1), shape


def _constants(weight: Any, weight_scale: Any, bias: Any, x_scale: float, engine: str) -> tuple[Any, list[Any]]:
    """Weight behind DequantizeLinear and, if any, the bias: int32 behind one too, or float for OpenVINO. The zero points are written
    out: without them nothing fuses."""
    op, zeros = _op(), lambda kind: _const(np.zeros(weight.shape[0]), kind)
    w = op.DequantizeLinear(weight, weight_scale, zeros(np.int8), axis=0)
    if bias is None:
        return w, []
    if engine == OPENVINO:
        return w, [bias]
    s32 = op.Mul(_const(x_scale, np.float32), weight_scale)
    return w, [op.DequantizeLinear(bias, s32, zeros(np.int32), axis=0)]


def _linear(
    codes: Any, x_scale: float, x_zero_point: int, weight: Any, weight_scale: Any, bias: Any, engine: str
) -> tuple[Any, Any]:
    """The float output of a linear layer; and the shape that it returns to, or None."""
    if engine != OPENVINO or len(codes.shape) == 2:
        return _gemm(codes, x_scale, x_zero_point, weight, weight_scale, bias, engine)
    op = _op()
    w, b = _constants(weight, weight_scale, bias, x_scale, engine)
    y = op.MatMul(_dequantize(codes, x_scale, x_zero_point), op.Transpose(w, perm=[1, 0]))
    return (op.Add(y, *b) if b else y), None


def linear(codes, x_scale: float, x_zero_point: int, weight, weight_scale, bias, engine: str):
    """A linear layer with a float output: QGemm; FullyConnected."""
    y, shape = _linear(codes, x_scale, x_zero_point, weight, weight_scale, bias, engine)
    return y if shape is None else _op().Reshape(y, shape)


def linear_requantize(
    codes, x_scale: float, x_zero_point: int, weight, weight_scale, bias,
    scale: float, zero_point: int, lo: int, hi: int, engine: str, name: str,
):  # fmt: skip
    """A linear layer between DQ and Q: QGemm; FullyConnected."""
    y, shape = _linear(codes, x_scale, x_zero_point, weight, weight_scale, bias, engine)
    out = _quantize(y, scale, zero_point, lo, hi, engine)
    return out if shape is None else _op().Reshape(out, shape)


def _conv(
    codes, x_scale: float, x_zero_point: int, weight, weight_scale, bias,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, engine: str,
) -> Any:  # fmt: skip
    """DQ -> Conv, with a float output."""
    w, b = _constants(weight, weight_scale, bias, x_scale, engine)
    return _op().Conv(
        _dequantize(codes, x_scale, x_zero_point),
        w,
        *b,
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
        kernel_shape=list(weight.shape[2:]),
    )


def conv_requantize(
    codes, x_scale: float, x_zero_point: int, weight, weight_scale, bias,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    scale: float, zero_point: int, lo: int, hi: int, engine: str, name: str,
):  # fmt: skip
    """Conv between DQ and Q: QLinearConv; Convolution."""
    head = (codes, x_scale, x_zero_point, weight, weight_scale, bias, stride, padding, dilation, groups)
    return _quantize(_conv(*head, engine), scale, zero_point, lo, hi, engine)


def conv_add_requantize(
    codes, x_scale: float, x_zero_point: int, weight, weight_scale, bias,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    other, other_scale: float, other_zero_point: int,
    scale: float, zero_point: int, lo: int, hi: int, engine: str, name: str,
):  # fmt: skip
    """Conv -> Add of a dequantized tensor -> Q: one Convolution."""
    head = (codes, x_scale, x_zero_point, weight, weight_scale, bias, stride, padding, dilation, groups)
    total = _op().Add(_conv(*head, engine), _dequantize(other, other_scale, other_zero_point))
    return _quantize(total, scale, zero_point, lo, hi, engine)


def matmul(a, a_scale: float, a_zero_point: int, b, b_scale: float, b_zero_point: int, engine: str):
    """MatMul of two dequantized activations: MatMulIntegerToFloat."""
    return _op().MatMul(_dequantize(a, a_scale, a_zero_point), _dequantize(b, b_scale, b_zero_point))


def matmul_requantize(
    a, a_scale: float, a_zero_point: int, b, b_scale: float, b_zero_point: int,
    scale: float, zero_point: int, lo: int, hi: int, engine: str, name: str,
):  # fmt: skip
    """MatMul between DQ and Q: QLinearMatMul."""
    y = _op().MatMul(_dequantize(a, a_scale, a_zero_point), _dequantize(b, b_scale, b_zero_point))
    return _quantize(y, scale, zero_point, lo, hi, engine)


def add_requantize(
    a, a_scale: float, a_zero_point: int, b, b_scale: float, b_zero_point: int,
    scale: float, zero_point: int, lo: int, hi: int, engine: str, name: str,
):  # fmt: skip
    """Add between DQ and Q: QLinearAdd."""
    y = _op().Add(_dequantize(a, a_scale, a_zero_point), _dequantize(b, b_scale, b_zero_point))
    return _quantize(y, scale, zero_point, lo, hi, engine)


def global_average_pool_requantize(
    codes, x_scale: float, x_zero_point: int, scale: float, zero_point: int, lo: int, hi: int, engine: str, name: str
):
    """GlobalAveragePool between DQ and Q: QLinearGlobalAveragePool."""
    y = _op().GlobalAveragePool(_dequantize(codes, x_scale, x_zero_point))
    return _quantize(y, scale, zero_point, lo, hi, engine)


def max_pool2d(x, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0, 0),
               dilation: Sequence[int] = (1, 1), ceil_mode: bool = False):  # fmt: skip
    """On codes as on floats (torch's own translation takes floats only)."""
    kernel = list(kernel_size) * (2 if len(kernel_size) == 1 else 1)
    pads = list(padding) * (2 if len(padding) == 1 else 1)
    values, _ = _op().MaxPool(
        x,
        kernel_shape=kernel,
        strides=list(stride) * (2 if len(stride) == 1 else 1) if stride else kernel,
        pads=[*pads, *pads],
        dilations=list(dilation) * (2 if len(dilation) == 1 else 1),
        ceil_mode=int(ceil_mode),
    )
    return values


def embedding(ids, table, scale, bits: int, size: int):
    """8 bits, one scale a row: Gather -> Cast -> Mul by the gathered scale (every engine). Else GatherBlockQuantized."""
    op = _op()
    if bits == 8 and scale.shape[1] == 1:
        rows = op.Cast(op.Gather(table, ids, axis=0), to=1)
        return op.Mul(rows, op.Gather(scale, ids, axis=0))
    ms = microsoft.opset()
    return ms.GatherBlockQuantized(table, ids, scale, gather_axis=0, quantize_axis=1, block_size=size, bits=bits)


def dynamic_linear(x, weight, weight_scale, bias):
    """DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul (-> Add): fuses into DynamicQuantizeMatMul."""
    op = _op()
    codes, scale, zero = op.DynamicQuantizeLinear(x)
    acc = op.MatMulInteger(codes, op.Transpose(weight, perm=[1, 0]), zero)
    y = op.Mul(op.Cast(acc, to=1), op.Mul(scale, weight_scale))
    return y if bias is None else op.Add(y, bias)


def block_linear(x, weight, weight_scale, bias, bits: int, size: int):
    """MatMulNBits with accuracy level 4: int8 activations per block."""
    outputs, blocks = weight.shape[0], weight.shape[1]
    inputs = [x, weight, weight_scale]
    if bias is not None:
        inputs += [None, None, bias]
    return microsoft.opset().MatMulNBits(
        *inputs, K=int(blocks) * size, N=int(outputs), bits=bits, block_size=size, accuracy_level=4
    )


def table() -> dict[Any, Callable[..., Any]]:
    """torch.onnx's custom translation table."""
    ops = torch.ops.qatana
    return {
        ops.quantize.default: quantize,
        ops.dequantize.default: dequantize,
        ops.linear.default: linear,
        ops.linear_requantize.default: linear_requantize,
        ops.conv_requantize.default: conv_requantize,
        ops.conv_add_requantize.default: conv_add_requantize,
        ops.matmul.default: matmul,
        ops.matmul_requantize.default: matmul_requantize,
        ops.add_requantize.default: add_requantize,
        ops.global_average_pool_requantize.default: global_average_pool_requantize,
        ops.embedding.default: embedding,
        ops.dynamic_linear.default: dynamic_linear,
        ops.block_linear.default: block_linear,
        torch.ops.aten.max_pool2d.default: max_pool2d,
    }

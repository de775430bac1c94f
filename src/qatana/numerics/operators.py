"""The integer operators of a converted model, declared once with torch.library.

Each takes codes and plain-number parameters, so an exported graph reads like the file it becomes: one ONNX translation per
operator (export/), one reference here, which evaluates the engine's formula on an exact accumulator. `name` is the name of the
quantizer whose codes the operator returns: `verify` compares tensors by it. Activations are per tensor; weights (N, ...) are
per output channel with scale (N,), bias in the engine's own form (int32 codes or float32)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qatana.numerics import accumulate
from qatana.numerics.affine import dequantize as _dequantize
from qatana.numerics.dynamic import dynamic_blocks, dynamic_tensor
from qatana.numerics.engine import Affine
from qatana.numerics.engines import engine as engine_named
from qatana.numerics.formats import IntFormat
from qatana.numerics.packing import unpack


def _codes(levels: Tensor, y: Affine) -> Tensor:
    return (levels + y.zero_point).to(code_dtype(y.lo))


def code_dtype(lo: int) -> torch.dtype:
    """Storage of codes by the format's lowest one."""
    return torch.int8 if lo < 0 else torch.uint8


@torch.library.custom_op("qatana::quantize", mutates_args=())
def quantize(x: Tensor, scale: float, zero_point: int, lo: int, hi: int, engine: str, name: str) -> Tensor:
    """x float32 (*shape) -> codes (*shape) by the engine's QuantizeLinear."""
    y = Affine.of(scale, zero_point, lo, hi)
    return _codes(engine_named(engine).levels(x, y), y)


@quantize.register_fake
def _(x, scale, zero_point, lo, hi, engine, name):
    return torch.empty_like(x, dtype=code_dtype(lo))


@torch.library.custom_op("qatana::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: float, zero_point: int) -> Tensor:
    """codes (*shape) -> (code - zero_point) * scale, float32."""
    return _dequantize(codes, torch.tensor(scale, dtype=torch.float32), float(zero_point))


@dequantize.register_fake
def _(codes, scale, zero_point):
    return torch.empty_like(codes, dtype=torch.float32)


def _linear_accumulator(codes: Tensor, x_zero_point: int, weight: Tensor) -> Tensor:
    levels = codes.float() - x_zero_point
    return accumulate.linear(levels, weight.float(), 255)


@torch.library.custom_op("qatana::linear", mutates_args=())
def linear(
    codes: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, engine: str
) -> Tensor:  # fmt: skip
    """codes (*batch, K), weight codes (N, K) -> float32 (*batch, N)."""
    acc = _linear_accumulator(codes, x_zero_point, weight)
    return engine_named(engine).linear(acc, _f32(x_scale) * weight_scale, _term(bias))


@linear.register_fake
def _(codes, x_scale, x_zero_point, weight, weight_scale, bias, engine):
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=torch.float32)


@torch.library.custom_op("qatana::linear_requantize", mutates_args=())
def linear_requantize(
    codes: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    scale: float, zero_point: int, lo: int, hi: int, engine: str, name: str,
) -> Tensor:  # fmt: skip
    """codes (*batch, K), weight codes (N, K) -> codes (*batch, N)."""
    y = Affine.of(scale, zero_point, lo, hi)
    acc = _linear_accumulator(codes, x_zero_point, weight)
    s32 = _f32(x_scale) * weight_scale
    return _codes(engine_named(engine).linear_levels(acc, s32, _term(bias), y, x_zero_point), y)


@linear_requantize.register_fake
def _(codes, x_scale, x_zero_point, weight, weight_scale, bias, scale, zero_point, lo, hi, engine, name):
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=code_dtype(lo))


class _Convolved(NamedTuple):
    """A convolution before its rounding: exact accumulator, scale and bias that broadcast over it."""

    acc: Tensor
    s32: Tensor
    bias: Tensor | None


def _convolve(
    codes: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> _Convolved:  # fmt: skip
    levels = codes.float() - x_zero_point
    acc = accumulate.conv(levels, weight.float(), 255, stride, padding, dilation, groups)
    tail = (-1,) + (1,) * (weight.ndim - 2)
    return _Convolved(acc, (_f32(x_scale) * weight_scale).view(tail), None if bias is None else bias.float().view(tail))


def _convolved_shape(codes, weight, stride, padding, dilation) -> list[int]:
    space = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(codes.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    return [codes.shape[0], weight.shape[0], *space]


@torch.library.custom_op("qatana::conv_requantize", mutates_args=())
def conv_requantize(
    codes: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    scale: float, zero_point: int, lo: int, hi: int, engine: str, name: str,
) -> Tensor:  # fmt: skip
    """1-D or 2-D convolution (by the weight's rank) of codes (B, C, *space) -> codes (B, N, *space'); pads with the zero point."""
    y = Affine.of(scale, zero_point, lo, hi)
    conv = _convolve(codes, x_scale, x_zero_point, weight, weight_scale, bias, stride, padding, dilation, groups)
    return _codes(engine_named(engine).conv_levels(*conv, y), y)


@conv_requantize.register_fake
def _(codes, x_scale, x_zero_point, weight, weight_scale, bias, stride, padding, dilation, groups,
      scale, zero_point, lo, hi, engine, name):  # fmt: skip
    return codes.new_empty(_convolved_shape(codes, weight, stride, padding, dilation), dtype=code_dtype(lo))


@torch.library.custom_op("qatana::conv_add_requantize", mutates_args=())
def conv_add_requantize(
    codes: Tensor, x_scale: float, x_zero_point: int, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    other: Tensor, other_scale: float, other_zero_point: int,
    scale: float, zero_point: int, lo: int, hi: int, engine: str, name: str,
) -> Tensor:  # fmt: skip
    """`conv_requantize` with the codes `other` (B, N, *space') added before the rounding. A ReLU is the clamp at lo = zero_point."""
    y, p = Affine.of(scale, zero_point, lo, hi), Affine.of(other_scale, other_zero_point, 0, 255)
    conv = _convolve(codes, x_scale, x_zero_point, weight, weight_scale, bias, stride, padding, dilation, groups)
    return _codes(engine_named(engine).conv_add_levels(*conv, other.float() - other_zero_point, p, y), y)


@conv_add_requantize.register_fake
def _(codes, x_scale, x_zero_point, weight, weight_scale, bias, stride, padding, dilation, groups,
      other, other_scale, other_zero_point, scale, zero_point, lo, hi, engine, name):  # fmt: skip
    return codes.new_empty(_convolved_shape(codes, weight, stride, padding, dilation), dtype=code_dtype(lo))


def _product(a: Tensor, a_zero_point: int, b: Tensor, b_zero_point: int) -> Tensor:
    return accumulate.matmul(a.float() - a_zero_point, b.float() - b_zero_point, 255, 255)


@torch.library.custom_op("qatana::matmul", mutates_args=())
def matmul(
    a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, b_scale: float, b_zero_point: int, engine: str
) -> Tensor:
    """Product of two activations: codes (*batch, M, K) x (*batch, K, N) -> float32 (*batch, M, N)."""
    acc = _product(a, a_zero_point, b, b_zero_point)
    return engine_named(engine).product(acc, _f32(a_scale) * _f32(b_scale))


@matmul.register_fake
def _(a, a_scale, a_zero_point, b, b_scale, b_zero_point, engine):
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("qatana::matmul_requantize", mutates_args=())
def matmul_requantize(
    a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, b_scale: float, b_zero_point: int,
    scale: float, zero_point: int, lo: int, hi: int, engine: str, name: str,
) -> Tensor:  # fmt: skip
    """Product of two activations: codes (*batch, M, K) x (*batch, K, N) -> codes (*batch, M, N)."""
    y = Affine.of(scale, zero_point, lo, hi)
    acc = _product(a, a_zero_point, b, b_zero_point)
    return _codes(engine_named(engine).product_levels(acc, _f32(a_scale) * _f32(b_scale), y), y)


@matmul_requantize.register_fake
def _(a, a_scale, a_zero_point, b, b_scale, b_zero_point, scale, zero_point, lo, hi, engine, name):
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=code_dtype(lo))


@torch.library.custom_op("qatana::add_requantize", mutates_args=())
def add_requantize(
    a: Tensor, a_scale: float, a_zero_point: int, b: Tensor, b_scale: float, b_zero_point: int,
    scale: float, zero_point: int, lo: int, hi: int, engine: str, name: str,
) -> Tensor:  # fmt: skip
    """Sum of two activations of codes (shapes broadcast) -> codes. A ReLU behind it is the clamp at lo = zero_point."""
    y = Affine.of(scale, zero_point, lo, hi)
    pa, pb = Affine.of(a_scale, a_zero_point, 0, 255), Affine.of(b_scale, b_zero_point, 0, 255)
    la, lb = a.float() - a_zero_point, b.float() - b_zero_point
    return _codes(engine_named(engine).add_levels(la, pa, lb, pb, y), y)


@add_requantize.register_fake
def _(a, a_scale, a_zero_point, b, b_scale, b_zero_point, scale, zero_point, lo, hi, engine, name):
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return a.new_empty(shape, dtype=code_dtype(lo))


@torch.library.custom_op("qatana::global_average_pool_requantize", mutates_args=())
def global_average_pool_requantize(
    codes: Tensor, x_scale: float, x_zero_point: int,
    scale: float, zero_point: int, lo: int, hi: int, engine: str, name: str,
) -> Tensor:  # fmt: skip
    """Mean over all spatial positions: codes (B, C, *space) -> codes (B, C, 1, ..., 1)."""
    y = Affine.of(scale, zero_point, lo, hi)
    x = Affine.of(x_scale, x_zero_point, 0, 255)
    dims = tuple(range(2, codes.ndim))
    total = (codes.double() - x_zero_point).sum(dims, keepdim=True).float()
    count = codes[0, 0].numel()
    return _codes(engine_named(engine).average_pool_levels(total, count, x, y), y)


@global_average_pool_requantize.register_fake
def _(codes, x_scale, x_zero_point, scale, zero_point, lo, hi, engine, name):
    return codes.new_empty((*codes.shape[:2], *(1,) * (codes.ndim - 2)), dtype=code_dtype(lo))


@torch.library.custom_op("qatana::embedding", mutates_args=())
def embedding(ids: Tensor, table: Tensor, scale: Tensor, bits: int, size: int) -> Tensor:
    """Rows of a table of codes with one scale per `size` elements of a row: ids (*shape) -> level * scale, float32 (*shape, D).

    bits 8: table int8 (V, D). Fewer: bytes (V, D * bits / 8) of unsigned codes, low bits first, whose zero point is 2^(bits-1)."""
    rows, scales = table[ids], scale[ids]
    levels = rows.float() if bits == 8 else unpack(rows, scales.shape[-1] * size, IntFormat(bits, signed=False)).float()
    levels = levels if bits == 8 else levels - 2 ** (bits - 1)
    blocks = levels.view(*levels.shape[:-1], scales.shape[-1], size)
    return (blocks * scales[..., None]).view(levels.shape)


@embedding.register_fake
def _(ids, table, scale, bits, size):
    return scale.new_empty((*ids.shape, scale.shape[1] * size))


@torch.library.custom_op("qatana::dynamic_linear", mutates_args=())
def dynamic_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """DynamicQuantizeLinear + MatMulInteger: f32(acc) * f32(x_scale * w_scale), then + bias.   x (*batch, K) -> (*batch, N)."""
    levels, scale, _ = dynamic_tensor(x)
    y = accumulate.linear(levels, weight.float(), 255).float() * (scale * weight_scale)
    return y if bias is None else y + bias


@dynamic_linear.register_fake
def _(x, weight, weight_scale, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("qatana::block_linear", mutates_args=())
def block_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int, size: int) -> Tensor:
    """MatMulNBits, accuracy level 4: int8 activations per row and block, unsigned packed weight codes (N, K / size, size * bits / 8)
    with zero point 2^(bits-1), scale (N, K / size).   x (*batch, K) -> float32 (*batch, N).

    Codes are the engine's; the sums of the blocks are added in torch's order, so floats differ from the engine's by ulps
    (`numerics.nbits` has the engine's order)."""
    levels, scale = dynamic_blocks(x, size)
    x_hat = (levels * scale).reshape(x.shape)
    codes = unpack(weight, size, IntFormat(bits, signed=False)).float() - 2 ** (bits - 1)
    w_hat = (codes * weight_scale[..., None]).reshape(weight.shape[0], -1)
    return torch.nn.functional.linear(x_hat, w_hat, bias)


@block_linear.register_fake
def _(x, weight, weight_scale, bias, bits, size):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _f32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _term(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()

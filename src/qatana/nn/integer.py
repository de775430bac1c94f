"""Layers of a converted model: codes and plain numbers, no fake quantization. Each takes and returns floats that lie
on a grid, so that layers compose in any model; the artifact's graph then cancels quantize(dequantize(codes))."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from qatana.numerics import operators as ops
from qatana.quantizer import Quantizer


class Codes:
    """Plain-number parameters of one static per-tensor activation, read off its quantizer."""

    def __init__(self, quantizer: Quantizer) -> None:
        y = quantizer.affine()
        self.scale, self.zero_point = float(y.scale), int(y.zero_point)
        self.lo, self.hi = y.lo, y.hi
        self.engine, self.name = quantizer.engine.name, quantizer.name

    @property
    def grid(self) -> tuple[float, int]:
        return self.scale, self.zero_point

    @property
    def output(self) -> tuple[float, int, int, int, str, str]:
        """The trailing arguments of a requantizing operator."""
        return self.scale, self.zero_point, self.lo, self.hi, self.engine, self.name

    def quantize(self, x: Tensor) -> Tensor:
        return ops.quantize(x, *self.output)

    def dequantize(self, codes: Tensor) -> Tensor:
        return ops.dequantize(codes, *self.grid)


class _WithCodes(nn.Module):
    """A layer whose buffer "weight" (N, ...) holds codes.

    Models read their layers' weights: vision towers cast pixels to the type of their first one. They get x_hat; the codes stay in the
    buffer, under the name that the float layer has."""

    weight_scale: Tensor

    @property
    def codes(self) -> Tensor:
        """What the buffer "weight" holds."""
        codes = self._buffers.get("weight")
        if codes is None:
            raise AttributeError(f"{type(self).__name__} has no codes yet")
        return codes

    @property
    def weight(self) -> Tensor:
        """x_hat of the codes, float32."""
        return self.codes * self.weight_scale.view(-1, *(1,) * (self.codes.ndim - 1))


class IntegerLinear(_WithCodes):
    """quantize -> integer product -> float, or -> requantized codes -> float.   x (*batch, K) -> (*batch, N)."""

    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, x: Codes, y: Codes | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias)
        self.x, self.y = x, y

    def forward(self, x: Tensor) -> Tensor:
        codes = self.x.quantize(x)
        head = (codes, *self.x.grid, self.codes, self.weight_scale, self.bias)
        if self.y is None:
            return ops.linear(*head, self.x.engine)
        return self.y.dequantize(ops.linear_requantize(*head, *self.y.output))


class DynamicLinear(_WithCodes):
    """Activations quantized to uint8 by their own range at run time; float bias.   x (*batch, K) -> (*batch, N)."""

    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.dynamic_linear(x, self.codes, self.weight_scale, self.bias)


class BlockLinear(nn.Module):
    """MatMulNBits: unsigned weight codes packed `bits` to the element in blocks along K, int8 activations per block
    at run time."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int, size: int) -> None:
        super().__init__()
        self.register_buffer("weight", packed)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias)
        self.bits, self.size = bits, size

    def forward(self, x: Tensor) -> Tensor:
        return ops.block_linear(x, self.weight, self.weight_scale, self.bias, self.bits, self.size)


class IntegerConv(_WithCodes):
    """quantize -> integer convolution (and sum with `other`) -> requantized codes -> float.   x (B, C, *space) -> (B, N, *space')."""

    bias: Tensor | None

    def __init__(
        self, weight: Tensor, scale: Tensor, bias: Tensor | None, x: Codes, other: Codes | None, y: Codes,
        geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias)
        self.x, self.other, self.y = x, other, y
        stride, padding, dilation, groups = geometry
        self.geometry = (list(stride), list(padding), list(dilation), groups)
        self.stride, self.padding, self.dilation, self.groups = self.geometry

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        head = (self.x.quantize(x), *self.x.grid, self.codes, self.weight_scale, self.bias, *self.geometry)
        if self.other is None or other is None:
            return self.y.dequantize(ops.conv_requantize(*head, *self.y.output))
        summand = (self.other.quantize(other), *self.other.grid)
        return self.y.dequantize(ops.conv_add_requantize(*head, *summand, *self.y.output))


class IntegerEmbedding(nn.Module):
    """Rows of a table of codes, packed below 8 bits: ids (*shape) -> float32 (*shape, D)."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, packed: Tensor, scale: Tensor, bits: int, size: int) -> None:
        super().__init__()
        self.register_buffer("weight", packed)
        self.register_buffer("weight_scale", scale)
        self.bits, self.size = bits, size

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.weight, self.weight_scale, self.bits, self.size)


class IntegerAdd(nn.Module):
    """Sum of two tensors on their codes, requantized."""

    def __init__(self, a: Codes, b: Codes, y: Codes) -> None:
        super().__init__()
        self.a, self.b, self.y = a, b, y

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        codes = ops.add_requantize(self.a.quantize(a), *self.a.grid, self.b.quantize(b), *self.b.grid, *self.y.output)
        return self.y.dequantize(codes)


class IntegerGlobalAveragePool(nn.Module):
    """Mean over the map on codes, requantized: (B, C, *space) -> (B, C, 1, ..., 1)."""

    def __init__(self, x: Codes, y: Codes) -> None:
        super().__init__()
        self.x, self.y = x, y

    def forward(self, x: Tensor) -> Tensor:
        return self.y.dequantize(ops.global_average_pool_requantize(self.x.quantize(x), *self.x.grid, *self.y.output))


class IntegerAttention(nn.Module):
    """softmax(scaling * q k^T + mask) v with both products on codes; the context is requantized."""

    def __init__(self, q: Codes, k: Codes, p: Codes, v: Codes, y: Codes) -> None:
        super().__init__()
        self.q, self.k, self.p, self.v, self.y = q, k, p, v, y

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float = 0.0
    ) -> Tensor:
        q, k = self.q.quantize(query), self.k.quantize(key)
        scale = float(np.float32(self.q.scale) * np.float32(scaling))
        scores = ops.matmul(q, scale, self.q.zero_point, k.transpose(-1, -2), *self.k.grid, self.y.engine)
        if mask is not None:
            scores = scores + mask
        p, v = self.p.quantize(torch.softmax(scores, dim=-1)), self.v.quantize(value)
        return self.y.dequantize(ops.matmul_requantize(p, *self.p.grid, v, *self.v.grid, *self.y.output))

"""The arithmetic of the engines: what each computes from an exact accumulator, to the bit.

With acc the exact int32 sum, s32 = f32(x_scale * weight_scale) and y = (scale, zero_point, lo, hi) of the output, every named value
below is float32 and every operation rounds to float32 unless it says fma (one rounding). Layers call these functions in training
(gradients are straight-through) and the integer operators call the same functions in inference, so both give the same codes.
The formulas are measured: docs/numerics.md names the engine versions and the tests that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qatana.errors import SchemeError
from qatana.numerics.affine import replace_forward, round_clamp


class Affine(NamedTuple):
    """Parameters of one per-tensor quantized activation: scale and zero point (float32 scalars), code range."""

    scale: Tensor
    zero_point: Tensor
    lo: int
    hi: int

    @property
    def bound(self) -> int:
        """The largest |level| whatever the zero point."""
        return self.hi - self.lo

    @classmethod
    def of(cls, scale: float, zero_point: int, lo: int, hi: int) -> Affine:
        return cls(torch.tensor(scale, dtype=torch.float32), torch.tensor(float(zero_point)), lo, hi)

    def clamp_levels(self, t: Tensor) -> Tensor:
        """clamp(rint(t)) in levels: ONNX Runtime's first rounding convention, rint(t) + zero_point."""
        return round_clamp(t.float(), self.lo - self.zero_point, self.hi - self.zero_point)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """f32(a * b + c) with one rounding.   The product of two float32 is exact in float64; the sum there is exact for operands within
    2^29 of each other, as all scales and codes here are."""
    return (a.double() * b.double() + c.double()).float()


@dataclass(frozen=True)
class Engine:
    """ONNX Runtime on CPUs (measured on 1.31; XNNPACK shares its linear and convolution)."""

    name: str = "onnxruntime"
    integer_bias: bool = True
    fuses: bool = True
    """Whether its formulas ask no tensor for its value, so that a compiler can fuse them."""

    def levels(self, x: Tensor, y: Affine) -> Tensor:
        """QuantizeLinear: rint(x / scale) + zero_point, saturated."""
        return y.clamp_levels(x.float() / y.scale)

    def encode(self, x: Tensor, y: Affine, relu: bool, mask: bool) -> tuple[Tensor, Tensor | None]:
        """Codes of x, or of max(x, 0), as floats, and where x was inside the range (and above 0), if asked for. No gradient."""
        unclamped = (x.float() / y.scale).round_().add_(y.zero_point)
        codes = unclamped.clamp(y.lo, y.hi)
        if relu:
            codes = torch.maximum(codes, y.zero_point.clamp(y.lo, y.hi))
        if not mask:
            return codes, None
        inside = unclamped.eq(codes)
        return codes, inside.logical_and_(x > 0) if relu else inside

    def bias_term(self, bias: Tensor, s32: Tensor) -> Tensor:
        """The bias as the accumulator takes it: int32 of scale s32, rint(bias / s32)."""
        limit = 2.0**31 - 2**7
        return round_clamp(bias.float() / s32, -limit, limit)

    def linear(self, acc: Tensor, s32: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Float output: f32(acc + b) * s32, with `bias` from `bias_term` and acc + b exact.   out: where to write it (may be acc)."""
        return torch.mul(_sum(acc, bias, out), s32, out=out)

    def linear_levels(
        self, acc: Tensor, s32: Tensor, bias: Tensor | None, y: Affine, x_zero_point: Tensor | int
    ) -> Tensor:
        """QGemm: rint(f32(acc + b) * f32(s32 / y_scale)) + y_zero_point, saturated, whatever the input's zero point."""
        return y.clamp_levels(_sum(acc, bias) * (s32 / y.scale))

    def conv_levels(self, acc: Tensor, s32: Tensor, bias: Tensor | None, y: Affine) -> Tensor:
        """QLinearConv: the rule of `linear_levels`; a ReLU is the clamp at lo when y's zero point is lo."""
        return self.linear_levels(acc, s32, bias, y, 0)

    def conv_add_levels(
        self, acc: Tensor, s32: Tensor, bias: Tensor | None, other: Tensor, p: Affine, y: Affine
    ) -> Tensor:
        """A convolution and its sum with levels `other` of parameters p, rounded once. ONNX Runtime has no such kernel."""
        raise SchemeError(f"{self.name} does not sum in a convolution: the sum is an operator of its own")

    def product(self, acc: Tensor, s32: Tensor) -> Tensor:
        """Product of two activations, float output: f32(acc) * s32."""
        return self.linear(acc, s32, None)

    def product_levels(self, acc: Tensor, s32: Tensor, y: Affine) -> Tensor:
        """Product of two activations, QLinearMatMul: the rule of `linear_levels`."""
        return self.linear_levels(acc, s32, None, y, 0)

    def add_levels(self, a: Tensor, pa: Affine, b: Tensor, pb: Affine, y: Affine) -> Tensor:
        """QLinearAdd on levels a, b: r = f32(s / y_scale); fix = zy - fma(ra, za, f32(rb * zb));
        code = sat(rint(fma(A, ra, fma(B, rb, fix)))) on codes A = a + za, B = b + zb (zero point inside the rounding)."""
        surrogate = y.clamp_levels((a * pa.scale + b * pb.scale) / y.scale) if torch.is_grad_enabled() else None
        with torch.no_grad():
            ra, rb = pa.scale / y.scale, pb.scale / y.scale
            fix = y.zero_point - fma(ra, pa.zero_point, rb * pb.zero_point)
            value = fma(a + pa.zero_point, ra, fma(b + pb.zero_point, rb, fix))
            exact = torch.round(value).clamp(y.lo, y.hi) - y.zero_point
        return exact if surrogate is None else replace_forward(surrogate, exact)

    def average_pool_levels(self, total: Tensor, count: Tensor | int, x: Affine, y: Affine) -> Tensor:
        """QLinearGlobalAveragePool: rint(f32(S) * f32(x_scale / f32(y_scale * n))) + zero_point, S the exact sum of levels."""
        return y.clamp_levels(total * (x.scale / (y.scale * count)))


def _sum(acc: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """f32(acc + bias), one rounding: both are exact (integers below 2^24, or a float64 accumulator)."""
    if bias is None:
        return acc.float()
    return torch.add(acc, bias, out=out if acc.dtype == torch.float32 else None).float()

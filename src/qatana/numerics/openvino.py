"""OpenVINO's arithmetic on CPUs, to the bit, for files whose batch is free (measured on 2026.4; docs/numerics.md).

OpenVINO reads QuantizeLinear as a FakeQuantize with float bounds and derives its constants from them. With lo = 0 (uint8) or -128
(int8), the lowest code of the container, whatever the format's own range:

    low = s * (lo - z),   high = s * (lo + 255 - z),   isc = 255 / (high - low),   ish = (-low * 255) / (high - low),   sh = ish + lo
    Q(v; isc, ish) = rint(fma(clamp(v, low, high), isc, ish)) + lo

Every named value is float32 and every operation rounds to float32 unless it says fma. Biases stay float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qatana.numerics.affine import replace_forward, round_clamp
from qatana.numerics.engine import Affine, Engine, fma


class Bounds(NamedTuple):
    """A FakeQuantize: bounds, input scale and shift as float32, and the lowest code of the container."""

    low: Tensor
    high: Tensor
    scale: Tensor
    shift: Tensor
    lo: int

    @classmethod
    def of(cls, y: Affine, divisor: Tensor | None = None) -> Bounds:
        """Of an output; `divisor`: a scale that the engine moves from the operator before it into the bounds."""
        lo = -128 if y.lo < 0 else 0
        low, high = y.scale * (lo - y.zero_point), y.scale * (lo + 255 - y.zero_point)
        if divisor is not None:
            low, high = low / divisor, high / divisor
        steps = torch.full_like(high, 255.0)
        return cls(low, high, steps / (high - low), (-low * steps) / (high - low), lo)

    def levels(self, v: Tensor, y: Affine) -> Tensor:
        """Q(v) - zero point, within the format's range. No gradient."""
        code = torch.round(fma(torch.clamp(v, self.low, self.high), self.scale, self.shift)) + self.lo
        return torch.clamp(code, y.lo, y.hi) - y.zero_point


@dataclass(frozen=True)
class OpenVino(Engine):
    """OpenVINO on x86 CPUs, INFERENCE_PRECISION_HINT f32, shapes not fixed."""

    name: str = "openvino"
    integer_bias: bool = False
    fuses: bool = False

    def levels(self, x: Tensor, y: Affine) -> Tensor:
        """QuantizeLinear behind any operator that is no integer product: Q(x).

        Behind one (Linear, GELU, QuantizeLinear run as one kernel) the shift is sh, which is the same number for uint8 with a zero
        point above 0: the format of a linear layer's input in this target."""
        if y.lo >= 0 and _is_zero(y.zero_point):
            return y.clamp_levels(x.float() * Bounds.of(y).scale)
        surrogate = _surrogate(lambda: x.float() / y.scale, y)
        with torch.no_grad():
            exact = Bounds.of(y).levels(x.float(), y)
        return _with_gradient(surrogate, exact)

    def encode(self, x: Tensor, y: Affine, relu: bool, mask: bool) -> tuple[Tensor, Tensor | None]:
        """As the base's, by this engine's `levels`."""
        inside = super().encode(x, y, relu, True)[1] if mask else None
        return self.levels(x.relu() if relu else x, y).add_(y.zero_point), inside

    def bias_term(self, bias: Tensor, s32: Tensor) -> Tensor:
        """The bias as the file has it: float32, on no grid."""
        return bias.float()

    def linear(self, acc: Tensor, s32: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Float output: f32(acc * s32) + b."""
        y = torch.mul(acc.float(), s32, out=out)
        return y if bias is None else torch.add(y, bias, out=out)

    def linear_levels(
        self, acc: Tensor, s32: Tensor, bias: Tensor | None, y: Affine, x_zero_point: Tensor | int
    ) -> Tensor:
        """P2 where the input is a matrix or has zero point 0 (the bias is then folded into the shift):
        rint(acc * f32(s32 * isc) + ((b * isc + ish) + lo));   else P1. A matrix without bias: P3."""
        if bias is None and acc.ndim == 2:
            return self._merged(acc, s32, y)
        if bias is None or not (acc.ndim == 2 or _is_zero(x_zero_point)):
            return self._separate(self.linear(acc, s32, bias), y)
        q = Bounds.of(y)
        t = acc.float() * (s32 * q.scale) + ((bias * q.scale + q.shift) + q.lo)
        return round_clamp(t, y.lo, y.hi) - y.zero_point

    def conv_levels(self, acc: Tensor, s32: Tensor, bias: Tensor | None, y: Affine) -> Tensor:
        """P1 with the bias, P3 without. A ReLU is the clamp at lo when y's zero point is lo."""
        return self._merged(acc, s32, y) if bias is None else self._separate(self.linear(acc, s32, bias), y)

    def conv_add_levels(
        self, acc: Tensor, s32: Tensor, bias: Tensor | None, other: Tensor, p: Affine, y: Affine
    ) -> Tensor:
        """With codes R = level + z of scale s:   v = f32((t - f32(s * z)) * f32(1 / s)) + R, t being P1's float output;   without bias
        v = f32((acc - f32(f32(s * z) / s32)) * f32(s32 / s)) + R.   Then P1 on v with the bounds divided by s. The convolution's own
        output is not rounded."""
        codes, offset = other + p.zero_point, p.scale * p.zero_point
        if bias is None:
            t = (acc.float() - offset / s32) * (s32 / p.scale)
        else:
            t = (self.linear(acc, s32, bias) - offset) * (torch.ones_like(p.scale) / p.scale)
        return self._finish(t + codes, Bounds.of(y, p.scale), y, p.scale)

    def product(self, acc: Tensor, s32: Tensor) -> Tensor:
        """Product of two activations, float output: f32(acc) * f32(1 / f32(1 / s32))."""
        return acc.float() * _twice_inverted(s32)

    def product_levels(self, acc: Tensor, s32: Tensor, y: Affine) -> Tensor:
        """Product of two activations: P3."""
        return self._merged(acc, s32, y)

    def add_levels(self, a: Tensor, pa: Affine, b: Tensor, pb: Affine, y: Affine) -> Tensor:
        """A sum of its own: v = f32(a * f32(sa / sb)) + b;   Q(v) with bounds low / sb, high / sb.   Exact where a is uint8 with zero
        point 0 and b has zero point 0 (measured); no target uses it, since a sum behind a convolution is part of that."""
        surrogate = _surrogate(lambda: (a * pa.scale + b * pb.scale) / y.scale, y)
        with torch.no_grad():
            exact = Bounds.of(y, pb.scale).levels(a * (pa.scale / pb.scale) + b, y)
        return _with_gradient(surrogate, exact)

    def average_pool_levels(self, total: Tensor, count: Tensor | int, x: Affine, y: Affine) -> Tensor:
        """Q(S * f32(1 / n)) with bounds low / x_scale, high / x_scale, S the exact sum of levels."""
        surrogate = _surrogate(lambda: total * (x.scale / (y.scale * count)), y)
        with torch.no_grad():
            share = torch.ones_like(x.scale) / torch.as_tensor(count, dtype=torch.float32, device=total.device)
            exact = Bounds.of(y, x.scale).levels(total * share, y)
        return _with_gradient(surrogate, exact)

    def _separate(self, t: Tensor, y: Affine) -> Tensor:
        """P1, from the float output t:   zero point 0: rint(t * d), d = f32(1 / f32(1 / isc));   else rint(fma(t, isc, sh)).
        For a format narrower than its container d = isc (the file has a Clip there)."""
        return self._finish(t, Bounds.of(y), y, None)

    def _merged(self, acc: Tensor, s32: Tensor, y: Affine) -> Tensor:
        """P3: the rule of P1 on acc, with the bounds divided by s32."""
        return self._finish(acc.float(), Bounds.of(y, s32), y, s32)

    def _finish(self, v: Tensor, q: Bounds, y: Affine, unit: Tensor | None) -> Tensor:
        """The kernels' own quantization of v, a value in multiples of `unit`."""
        if _is_zero(y.zero_point):
            return y.clamp_levels(v * (_twice_inverted(q.scale) if y.hi - y.lo == 255 else q.scale))
        surrogate = _surrogate(lambda: (v if unit is None else v * unit) / y.scale, y)
        with torch.no_grad():
            exact = torch.clamp(torch.round(fma(v, q.scale, q.shift + q.lo)), y.lo, y.hi) - y.zero_point
        return _with_gradient(surrogate, exact)


def _twice_inverted(scale: Tensor) -> Tensor:
    """f32(1 / f32(1 / scale)): a scale that went through its inverse, as oneDNN's output scales do."""
    one = torch.ones_like(scale)
    return one / (one / scale)


def _is_zero(zero_point: Tensor | int) -> bool:
    return bool(zero_point == 0)


def _surrogate(value: Callable[[], Tensor], y: Affine) -> Tensor | None:
    """The clipped straight-through form whose gradient training uses; None where no gradient is wanted."""
    return y.clamp_levels(value()) if torch.is_grad_enabled() else None


def _with_gradient(surrogate: Tensor | None, exact: Tensor) -> Tensor:
    return exact if surrogate is None else replace_forward(surrogate, exact)

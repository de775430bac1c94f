"""Stochastic rounding: quantized gradients whose expectation is the gradient.

    scale = max |g| / largest level       per tensor, channel, token, group or block: nothing is clipped
    t = g / scale, between two neighbouring levels a <= t < b of the format
    level = b with probability (t - a) / (b - a), else a        so E[level * scale] = g
Reference: Gupta et al. 2015 (fixed point); Wang et al. 2018 (8-bit floats)."""

from __future__ import annotations

import torch
from torch import Tensor

from qatana.errors import SchemeError
from qatana.numerics.formats import FloatFormat, IntFormat
from qatana.numerics.scheme import Scheme


def check_gradient_scheme(scheme: Scheme) -> IntFormat | FloatFormat:
    """The format of a scheme that gradients can have. Raises: SchemeError naming what a gradient cannot have."""
    format = scheme.format
    if not isinstance(format, (IntFormat, FloatFormat)) or scheme.rule:
        raise SchemeError(f"gradients are rounded to integers or floats, not by '{scheme}': use 'int8' or 'fp8:e5m2'")
    if not scheme.symmetric or (isinstance(format, IntFormat) and not format.signed):
        raise SchemeError(f"gradients have both signs and many zeros: use a signed symmetric format, not '{scheme}'")
    if scheme.scale != "dynamic" or scheme.scale_type.name != "float32":
        raise SchemeError(
            f"a gradient's scale is a float32 number taken from it at each step, not '{scheme}': scale='dynamic'"
        )
    if scheme.granularity.kind == "flat":
        raise SchemeError(
            f"gradients are quantized per tensor, channel, token, group or block, not per {scheme.granularity}"
        )
    return format


def stochastic(x: Tensor, scheme: Scheme, generator: torch.Generator | None = None) -> Tensor:
    """x rounded stochastically to the levels of a symmetric scheme, E[result] = x (to one ulp at the ends of the range).

    x (*shape), any float dtype; the result has its dtype and shape. NaN and infinity make their block NaN, so a loss scaler sees them.
    Raises: SchemeError where the scheme or its block size does not fit."""
    format = check_gradient_scheme(scheme)
    scheme.check(x.shape, "gradient")
    if not x.numel():
        return x.clone()
    view = scheme.granularity.view(x.float())
    largest = view.abs().amax(scheme.granularity.reduced_dims(view.ndim), keepdim=True)
    most = float(format.hi if isinstance(format, IntFormat) else format.largest)
    scale = (largest / torch.full_like(largest, most)).clamp(min=2.0**-126)
    t = view / scale
    if isinstance(format, FloatFormat):
        step = _step(t, format)
        t = t / step
    else:
        step = torch.ones_like(t)
    low = torch.floor(t)
    uniform = torch.rand(t.shape, dtype=t.dtype, device=t.device, generator=generator)
    level = (low + (uniform < t - low)) * step  # t - low is exact, t + uniform would not be
    return (level.clamp(-most, most) * scale).reshape(x.shape).to(x.dtype)


def _step(t: Tensor, format: FloatFormat) -> Tensor:
    """Distance of the neighbouring levels around t: 2^(max(floor(log2 |t|), 1 - bias) - mantissa), exactly."""
    exponent = (t.abs().contiguous().view(torch.int32) >> 23) - 127
    exponent = exponent.clamp(1 - format.bias, format.largest_exponent) - format.mantissa
    return ((exponent + 127) << 23).view(torch.float32)


@torch.library.custom_op("qatana::stochastic", mutates_args=())
def _stochastic(x: Tensor, scheme: str) -> Tensor:
    return stochastic(x, Scheme.parse(scheme))


@_stochastic.register_fake
def _(x: Tensor, scheme: str) -> Tensor:
    return torch.empty_like(x)


class _QuantizeGradient(torch.autograd.Function):
    """Identity whose gradient is rounded; the rounding is one opaque call, the same in eager and in compiled graphs."""

    @staticmethod
    def forward(ctx, y: Tensor, scheme: str) -> Tensor:
        ctx.scheme = scheme
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return torch.ops.qatana.stochastic(grad, ctx.scheme), None


def quantize_gradient(y: Tensor, scheme: Scheme) -> Tensor:
    """y itself; the gradient that comes back through it is rounded stochastically by `scheme`. Draws from torch's generator."""
    return _QuantizeGradient.apply(y, scheme.text)  # type: ignore[return-value]

"""THE affine equation: the only place in qatana where a real becomes an integer.

    level = clamp(round_half_even(t), lo - zero_point, hi - zero_point),   t = x / scale      (a level is a code
    minus its zero point)
    code  = level + zero_point            x_hat = level * scale = (code - zero_point) * scale

so fake_quantize(x) == dequantize(quantize(x)) by construction. Scales divide (they are never inverted: x * (1 /
scale) differs from what engines compute in one code of 400). All of it is float32 whatever the dtype of x.

The gradient is the clipped straight-through estimator: d level / dt = 1 where round(t) lies within the range, else
0. With
t = x / scale left to autograd, the scale's gradient is LSQ's, exactly:  d x_hat / d scale = round(t) - t inside, lo
- zero_point or hi - zero_point outside (Esser et al. 2020, eq. 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qatana.numerics.formats import IntFormat


@torch.library.custom_op("qatana::round_clamp", mutates_args=())
def _round_clamp(t: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    rounded = torch.round(t)
    levels = torch.clamp(rounded, lower, upper)
    return levels, rounded == levels


@_round_clamp.register_fake
def _(t: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(t), torch.empty_like(t, dtype=torch.bool)


def _save_mask(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _straight_through(ctx, grad_levels: Tensor, _grad_mask: Tensor | None):
    (inside,) = ctx.saved_tensors
    return grad_levels * inside, None, None


_round_clamp.register_autograd(_straight_through, setup_context=_save_mask)


def number(value: Tensor) -> Any:
    """A scalar as a plain number where reading it costs nothing (on the CPU, untraced): clamping by tensors is ten times slower."""
    plain = type(value) is Tensor and value.ndim == 0 and value.device.type == "cpu"
    return value.item() if plain and not torch.compiler.is_compiling() else value


def round_clamp(t: Tensor, lower: Tensor | float, upper: Tensor | float) -> Tensor:
    """clamp(round_half_even(t), lower, upper), straight-through inside the bounds, gradient 0 outside.

    t float32 (*shape); bounds broadcast against it and get no gradient. Returns float32 integers."""
    lower = torch.as_tensor(lower, dtype=t.dtype, device=t.device)
    upper = torch.as_tensor(upper, dtype=t.dtype, device=t.device)
    if not t.requires_grad:
        return torch.round(t).clamp_(number(lower), number(upper))
    return _round_clamp(t, lower, upper)[0]


def levels(x: Tensor, scale: Tensor, zero_point: Tensor | float, lo: int, hi: int) -> Tensor:
    """Codes minus zero point as float32 integers: clamp(round(x / scale), lo - zero_point, hi - zero_point).

    Shapes: x (*shape); scale and zero_point broadcast against it (a block view where scales are per group)."""
    return round_clamp(x.float() / scale, lo - zero_point, hi - zero_point)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | float, format: IntFormat) -> Tensor:
    """Reals to codes: code = clamp(round_half_even(x / scale) + zero_point, lo, hi), in the format's storage dtype.

    Reference: Jacob et al. 2018, eq. 1."""
    with torch.no_grad():
        return (levels(x, scale, zero_point, format.lo, format.hi) + zero_point).to(format.dtype)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes to reals: x_hat = (code - zero_point) * scale, computed in float32, returned as `dtype`."""
    return ((codes.float() - zero_point) * scale).to(dtype)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | float, format: IntFormat) -> Tensor:
    """dequantize(quantize(x)) bit for bit, in the dtype of x, with straight-through (and LSQ scale) gradients."""
    return (levels(x, scale, zero_point, format.lo, format.hi) * scale).to(x.dtype)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The identity on finite numbers, whose gradient is multiplied by `factor` (LSQ: 1 / sqrt(N * Qp))."""
    constant = x.detach()
    return constant + (x - constant) * factor


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, surrogate: Tensor, exact: Tensor) -> Tensor:
        return exact

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0], None


def replace_forward(surrogate: Tensor, exact: Tensor) -> Tensor:
    """Value of `exact`, gradient of `surrogate`: for engine formulas whose bits differ from their differentiable
    form."""
    return _Replace.apply(surrogate, exact)

"""The sum of two coded tensors, requantized, as one operator: it keeps a bit per element for the backward pass.

codes = the engine's formula of both operands' codes (numerics.engine), behind a ReLU if asked for
d a_hat = d b_hat = d y where a_hat + b_hat, rounded, is inside y's range (and above 0, with a ReLU), else 0"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qatana.numerics.coded import Coded, in_memory_order, masked, memory_order, origin_of, place
from qatana.numerics.engine import Affine
from qatana.numerics.engines import engine as engine_named
from qatana.numerics.masks import bits_of, everywhere, length, sweep_blocks
from qatana.numerics.products import is_inside


def add(a: Coded, b: Coded, y: Affine, relu: bool, engine: str) -> tuple[Tensor, Tensor]:
    """Place and codes (minus their origin) of a_hat + b_hat.   a, b of one shape; the scale of y gets no gradient."""
    operands = (x for c in (a, b) for x in (c.hat, c.codes, c.scale, c.zero_point, c.origin))
    return _add(*operands, *y, relu, engine)[:2]


@torch.library.custom_op("qatana::coded_add", mutates_args=())
def _add(
    a_hat: Tensor, a: Tensor, a_scale: Tensor, a_zero: Tensor, a_origin: int,
    b_hat: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor, b_origin: int,
    y_scale: Tensor, y_zero: Tensor, lo: int, hi: int, relu: bool, engine: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.no_grad():
        arithmetic = engine_named(engine)
        dense, order = in_memory_order(a)
        flat, other = dense.reshape(-1), b.permute(order).contiguous().reshape(-1)
        out = torch.empty_like(a)
        inside = everywhere(flat.numel(), a.device)
        parameters = [a_scale, a_zero, b_scale, b_zero, y_scale, y_zero]
        constants = (arithmetic, a_origin, b_origin, lo, hi, relu)
        codes = out.permute(order).reshape(-1)
        sweep_blocks(_levels, codes, inside, [flat, other], parameters, *constants, compile=arithmetic.fuses)
    return place(out), out, inside


def _levels(a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Codes, minus their origin, of blocks, and the bits of where they are inside."""
    a_scale, a_zero, b_scale, b_zero, y_scale, y_zero, arithmetic, a_origin, b_origin, lo, hi, relu = rest
    y = Affine(y_scale, y_zero, lo, hi)
    pa, pb = Affine(a_scale, a_zero + a_origin, 0, 255), Affine(b_scale, b_zero + b_origin, 0, 255)
    la, lb = a.float() - a_zero, b.float() - b_zero
    levels, value = arithmetic.add_levels(la, pa, lb, pb, y), la * a_scale + lb * b_scale
    inside = is_inside(value, y)
    if relu:
        levels, inside = levels.clamp(min=0), inside.logical_and(value > 0)
    return (levels + (y_zero - origin_of(lo))).to(torch.int8), bits_of(inside)


@_add.register_fake
def _(a_hat, a, a_scale, a_zero, a_origin, b_hat, b, b_scale, b_zero, b_origin, y_scale, y_zero, lo, hi, relu, engine):
    return place(a), torch.empty_like(a), torch.empty(length(a.numel()), dtype=torch.uint8, device=a.device)


def _save(ctx, inputs, output) -> None:
    ctx.order = memory_order(inputs[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def _backward(ctx, grad: Tensor | None, *_: Tensor | None):
    if grad is not None:
        grad = masked(grad, ctx.saved_tensors[0], ctx.order)
    none = (None,) * 4
    return grad, *none, grad, *none, *(None,) * 6


_add.register_autograd(_backward, setup_context=_save)

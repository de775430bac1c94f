"""The sum of two coded tensors, requantized, as one operator: it keeps a bit per element for the backward pass.

codes = the engine's formula of both operands' codes (numerics.engine), behind a ReLU if asked for
d a_hat = d b_hat = d y where a_hat + b_hat, rounded, is inside y's range (and above 0, with a ReLU), else 0"""

from __future__ import annotations

import torch
from torch import Tensor

from qatana.numerics.coded import Coded, in_memory_order, masked, memory_order, origin_of, place
from qatana.numerics.engine import Affine
from qatana.numerics.engines import engine as engine_named
from qatana.numerics.masks import everywhere, length, pack_mask
from qatana.numerics.pieces import pieces
from qatana.numerics.products import touches_ends


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
        y, arithmetic = Affine(y_scale, y_zero, lo, hi), engine_named(engine)
        pa, pb = (
            Affine(s, z + origin, 0, 255) for s, z, origin in ((a_scale, a_zero, a_origin), (b_scale, b_zero, b_origin))
        )
        dense, order = in_memory_order(a)
        other = b.permute(order).contiguous().reshape(-1)
        out = torch.empty_like(a)
        flat, codes = dense.reshape(-1), out.permute(order).reshape(-1)
        inside = everywhere(flat.numel(), a.device)
        offset = y_zero - origin_of(lo)
        for piece in pieces(flat):
            la, lb = flat[piece].float().sub_(a_zero), other[piece].float().sub_(b_zero)
            levels = arithmetic.add_levels(la, pa, lb, pb, y)
            if relu or touches_ends(levels, y):
                value = la.mul_(a_scale).add_(lb.mul_(b_scale))
                rounded = torch.round(value / y_scale).add_(y_zero)
                where = rounded.eq(rounded.clamp(lo, hi))
                inside[piece.start // 8 : length(piece.stop)] = pack_mask(
                    where.logical_and_(value > 0) if relu else where
                )
                levels = levels.clamp_(min=0) if relu else levels
            codes[piece] = levels.add_(offset)
    return place(out), out, inside


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

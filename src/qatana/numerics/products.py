"""Products of codes: exact integer sums forward, gradients from the same codes backward.

    acc = (x_codes - z) w_codes^T                           exact, whichever kernel computes it
    y   = the engine's formula of acc                       bit for bit what the deployed file computes (numerics.engine)
    d x_hat = dy w_hat,  d w_hat = dy^T x_hat,  d b = sum dy   the float layer's, x_hat and w_hat read from codes into a buffer

What the backward pass keeps is codes: a byte per element, shared with every other product of the same tensor. Under autocast the
forward pass stays as it is, and the products of the backward pass run in bfloat16: codes are exact there, only dy is rounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qatana.numerics.coded import Coded, masked
from qatana.numerics.engine import Affine, Engine
from qatana.numerics.engines import engine as engine_named
from qatana.numerics.fused import sweep
from qatana.numerics.integer_sums import EXACT_FLOAT, EXACT_INT, MOST, integer_sum, row_sums
from qatana.numerics.masks import length, pack_mask
from qatana.numerics.openvino import OpenVino
from qatana.numerics.product_gradients import linear_gradients, reduced_gradients
from qatana.numerics.scheme import Scheme
from qatana.numerics.workspace import buffer

DYNAMIC = "dynamic"
"""In place of an engine's name: y = f32(acc) * s32, then + bias, as kernels do whose activations are quantized at run time."""


DYNAMIC_ARITHMETIC = OpenVino()
"""Whose float outputs have that formula."""

ROWS = "rows"
"""In place of an engine's name, for inputs with a scale per row and weights with one per row and block of columns, or per row:
y = f32(sum over blocks b, from the first, of f32(acc_b) * s_w[n, b]) * s_x[m], then + bias, every operation rounded to float32."""

AT_ONCE = 4
"""Blocks whose sums are made before they are added to y. A training step of BERT in blocks of 128, medians: 1 takes 1,068 ms, 2 1,037,
4 1,017, 6 1,027 (Zen 4, two threads)."""
LEAST_BLOCK = 64
"""Columns of a block from which integer products pay: each block is a product of its own, and a pass over y."""


def goes_by_rows(scheme: Scheme, weight: bool) -> bool:
    """Whether an input or a weight of this scheme is multiplied by the formula of `ROWS`, if the other is, too, and the weight is
    float32. The schemes decide, everywhere, so that a layer and its converted form compute the same."""
    plain = scheme.is_integer and scheme.symmetric and not scheme.integer_grid.rule and scheme.integer.bits <= 8
    kind, axis, size = scheme.granularity.kind, scheme.granularity.axis, scheme.granularity.size
    if not weight:
        return plain and kind == "token" and scheme.scale == "dynamic"
    return plain and ((kind == "channel" and axis == 0) or (kind == "group" and size >= LEAST_BLOCK))


def linear(x: Coded, w: Coded, bias: Tensor | None, engine: str) -> Tensor:
    """y = x_hat w_hat^T + b by the engine's formula for float outputs.   x (*batch, K), w (N, K), b (N,) -> float32 (*batch, N).

    Scales: x per tensor, w per channel or tensor. engine: its name, or DYNAMIC."""
    return _linear(*_operands(x, w), bias, engine, reduced_gradients(x.codes.device))


def linear_of_levels(x: Coded, w: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` by the formula of `ROWS` with a weight that is levels already: int8 (N, K), scale (N,) or (N, blocks)."""
    return _linear(x.hat, x.codes, x.scale, x.zero_point, w, w, scale, bias, ROWS, False)


def linear_again(x: Coded, w: Coded, bias: Tensor | None, engine: str) -> Callable[[], Tensor]:
    """What computes `linear`'s output once more, bit for bit, and keeps nothing that its backward pass does not keep.

    Raises, when called: RuntimeError if the bias has changed since."""
    version = None if bias is None else bias._version
    head = (x.codes, x.codes, x.scale, x.zero_point, w.codes, w.codes, w.scale)

    def compute() -> Tensor:
        if bias is not None and bias._version != version:
            raise RuntimeError(
                "a bias was modified in place between the forward and the backward pass; make the backward pass first"
            )
        return _linear(*head, None if bias is None else bias.detach(), engine, False)

    return compute


def linear_requantized(x: Coded, w: Coded, bias: Tensor | None, engine: str, y: Affine, learned: bool) -> Tensor:
    """y_hat, the engine's requantized output as floats on its grid: float32 (*batch, N).   x, w, bias as in `linear`.

    learned  the scale of y gets LSQ's gradient (the backward pass computes the sum once more instead of keeping it)"""
    head = _operands(x, w)
    return _linear_requantized(*head, bias, engine, *y, x.origin, learned, reduced_gradients(x.codes.device))[0]


def _operands(x: Coded, w: Coded) -> tuple[Any, ...]:
    return x.hat, x.codes, x.scale, x.zero_point, w.hat, w.codes, w.scale


def accumulator(x: Tensor, zero_point: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None, bool]:
    """Integers A (M, N), c (1, N) or None, and whether acc = A - c may reach 2^24: what `exact` makes acc of, inside a pass over A.

    x (M, K), w (N, K) int8. A is good until the next call of this thread (`integer_sum`). A GPU is not asked for the numbers, which would
    make the host wait: K alone decides there."""
    total, k, host = integer_sum(x, w), x.shape[1], x.device.type == "cpu"
    correction = None
    if total.numel() and (not host or bool(zero_point != 0)):
        correction = row_sums(w).mul_(zero_point).view(1, -1)
    wide = total.numel() > 0 and k * MOST * 255 >= EXACT_FLOAT and not (host and _is_small(total, correction))
    if (total.dtype == torch.float32 and wide) or k * MOST * 255 >= EXACT_INT:
        total = total.double()
    return total, None if correction is None else correction.to(total.dtype), wide


def _is_small(total: Tensor, correction: Tensor | None) -> bool:
    """Whether every |A - c| is below 2^24, by the largest |A| and |c|."""
    low, high = torch.aminmax(total)
    most = torch.maximum(-low, high) + (0 if correction is None else correction.abs().max())
    return bool(most < EXACT_FLOAT)


def exact(total: Tensor, correction: Tensor | None, wide: bool) -> Tensor:
    """acc: float32, or float64 where it may not fit."""
    acc = total if correction is None else total - correction
    return acc.double() if wide else acc.float()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@torch.library.custom_op("qatana::coded_linear", mutates_args=())
def _linear(
    x_hat: Tensor, x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w_hat: Tensor, w: Tensor, w_scale: Tensor,
    bias: Tensor | None, engine: str, reduced: bool,
) -> Tensor:  # fmt: skip
    with torch.no_grad():
        out = torch.empty((*x.shape[:-1], w.shape[0]), dtype=torch.float32, device=x.device)
        if engine == ROWS:
            _sum_blocks(_rows(x), x_scale.reshape(-1, 1), w, w_scale.reshape(w.shape[0], -1), bias, _rows(out))
            return out
        s32 = x_scale * w_scale.reshape(-1)
        arithmetic = DYNAMIC_ARITHMETIC if engine == DYNAMIC else engine_named(engine)
        term = None if bias is None else arithmetic.bias_term(bias, s32).view(1, -1)
        *sums, wide = accumulator(_rows(x), x_zero_point, w)
        sweep(_outputs, [_rows(out)], [*sums, s32.view(1, -1), term], arithmetic, wide)
    return out


def _sum_blocks(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the formula of `ROWS`.   x (M, K), x_scale (M, 1), w (N, K), w_scale (N, blocks), out (M, N).

    The sums of some blocks are made before a pass adds them to y, so that y is read and written less often."""
    blocks, last = w_scale.shape[1], None if bias is None else bias.float().view(1, -1)
    size = x.shape[1] // blocks
    for first in range(0, blocks, AT_ONCE):
        some = range(first, min(blocks, first + AT_ONCE))
        parts, ends = [slice(b * size, (b + 1) * size) for b in some], some.stop == blocks
        sums = [integer_sum(x[:, part], w[:, part], _block_sum(i, out, size)) for i, part in enumerate(parts)]
        scales = [w_scale[:, b].view(1, -1) for b in some]
        head = [out if first else None, x_scale if ends else None, last if ends else None]
        sweep(_add_blocks, [out], [*head, *sums, *scales])


def _block_sum(i: int, out: Tensor, size: int) -> Tensor | None:
    """Memory for the sums of the i-th of the blocks made at once; None where they may not fit int32 and come in memory of their own."""
    if size * MOST**2 >= EXACT_INT:
        return None
    return buffer(f"sum of block {i}", out.shape, torch.int32, out.device)


def _add_blocks(before: Tensor | None, x_scale: Tensor | None, bias: Tensor | None, *rest: Tensor) -> tuple[Tensor]:
    """y, with some blocks added in their order.   rest: their sums, then their scales"""
    y, count = before, len(rest) // 2
    for acc, scale in zip(rest[:count], rest[count:], strict=True):
        term = acc.float() * scale
        y = term if y is None else y + term
    assert y is not None
    y = y if x_scale is None else y * x_scale
    return (y if bias is None else y + bias,)


def _outputs(
    total: Tensor, correction: Tensor | None, s32: Tensor, term: Tensor | None, arithmetic: Engine, wide: bool
) -> tuple[Tensor]:
    return (arithmetic.linear(exact(total, correction, wide), s32, term),)


@_linear.register_fake
def _(x_hat, x, x_scale, x_zero_point, w_hat, w, w_scale, bias, engine, reduced):
    return torch.empty((*x.shape[:-1], w.shape[0]), dtype=torch.float32, device=x.device)


def _save_linear(ctx, inputs, output) -> None:
    _, *head, bias, _, ctx.reduced = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(*head[:3], *head[4:])


def _linear_backward(ctx, grad: Tensor):
    x, w, bias = _operand_gradients(ctx, grad, ctx.saved_tensors)
    return x, None, None, None, w, None, None, bias, None, None


def _operand_gradients(
    ctx, grad: Tensor, head: tuple[Tensor, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_w, need_b = (ctx.needs_input_grad[i] for i in (0, 4, 7))
    found = linear_gradients(grad, *head, need_x, need_w, ctx.reduced)
    x, w = (g if need else None for g, need in zip(found, (need_x, need_w), strict=True))
    return x, w, _rows(grad).sum(0).to(ctx.bias) if need_b else None


_linear.register_autograd(_linear_backward, setup_context=_save_linear)


# -- requantized outputs -------------------------------------------------------------------------------------------------
@torch.library.custom_op("qatana::coded_linear_requantized", mutates_args=())
def _linear_requantized(
    x_hat: Tensor, x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w_hat: Tensor, w: Tensor, w_scale: Tensor,
    bias: Tensor | None, engine: str,
    y_scale: Tensor, y_zero_point: Tensor, lo: int, hi: int, origin: int,
    learned: bool, reduced: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y_hat and where it was inside its range (no bits where the scale is learned)."""
    with torch.no_grad():
        arithmetic, s32 = engine_named(engine), x_scale * w_scale.reshape(-1)
        term = None if bias is None else arithmetic.bias_term(bias, s32).view(1, -1)
        out = torch.empty((*x.shape[:-1], w.shape[0]), dtype=torch.float32, device=x.device)
        flat = _rows(out)
        inside = torch.empty(0 if learned else flat.shape, dtype=torch.uint8, device=x.device)
        *sums, wide = accumulator(_rows(x), x_zero_point, w)
        operands = [*sums, s32.view(1, -1), term, y_scale, y_zero_point, x_zero_point + origin]
        constants = (arithmetic, lo, hi, x.ndim, not learned, wide)
        sweep(_levels, [flat, *([] if learned else [inside])], operands, *constants, compile=arithmetic.fuses)
    return out, pack_mask(inside)


def _levels(
    total: Tensor, correction: Tensor | None, s32: Tensor, term: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """y_hat, and where the real output, rounded, is inside the range.   rest: y's scale and zero point, x's zero point, engine, lo, hi, the
    dimensions of x (formulas ask whether the product is a matrix), whether to tell where inside"""
    y_scale, y_zero_point, x_zero_point, arithmetic, lo, hi, ndim, mask, wide = rest
    acc, y = exact(total, correction, wide), Affine(y_scale, y_zero_point, lo, hi)
    shaped = acc.view(*(1,) * (ndim - 2), *acc.shape)
    levels = arithmetic.linear_levels(shaped, s32, term, y, x_zero_point).view(acc.shape)
    if not mask:
        return (levels * y_scale,)
    return levels * y_scale, is_inside(arithmetic.linear(acc, s32, term), y).to(torch.int32)


def is_inside(value: Tensor, y: Affine) -> Tensor:
    """Where the real output `value`, rounded, is in the range of y. What is written as bytes goes by way of int32: compiled loops turn
    bools into bytes one by one, ten times slower."""
    rounded = torch.round(value / y.scale).add_(y.zero_point)
    return rounded.eq(rounded.clamp(y.lo, y.hi))


@_linear_requantized.register_fake
def _(x_hat, x, x_scale, x_zero_point, w_hat, w, w_scale, bias, engine,
      y_scale, y_zero_point, lo, hi, origin, learned, reduced):  # fmt: skip
    shape = (*x.shape[:-1], w.shape[0])
    count = 0 if learned else length(math.prod(shape))
    return (
        torch.empty(shape, dtype=torch.float32, device=x.device),
        torch.empty(count, dtype=torch.uint8, device=x.device),
    )


def _save_requantized(ctx, inputs, output) -> None:
    (_, x, x_scale, x_zero_point, _, w, w_scale, bias, ctx.engine,
     y_scale, y_zero_point, ctx.lo, ctx.hi, _, ctx.learned,
     ctx.reduced) = inputs  # fmt: skip
    ctx.bias, ctx.order = None if bias is None else bias.dtype, list(range(x.ndim))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    more = (bias, y_scale, y_zero_point) if ctx.learned else (output[1],)
    ctx.save_for_backward(x, x_scale, x_zero_point, w, w_scale, *more)


def _requantized_backward(ctx, grad: Tensor | None, _: Tensor | None):
    if grad is None:
        return (None,) * 16
    saved = ctx.saved_tensors  # once: gradient checkpointing unpacks each tensor a single time
    head, more, d_scale = saved[:5], saved[5:], None
    if ctx.learned:
        bounds = (ctx.engine, more[1], more[2], ctx.lo, ctx.hi)
        grad, d_scale = torch.ops.qatana.coded_linear_clipped(grad, *head, more[0], *bounds)
    else:
        grad = masked(grad, more[0], ctx.order)
    assert grad is not None
    x, w, bias = _operand_gradients(ctx, grad, head)
    return x, None, None, None, w, None, None, bias, None, d_scale, *(None,) * 6


_linear_requantized.register_autograd(_requantized_backward, setup_context=_save_requantized)


@torch.library.custom_op("qatana::coded_linear_clipped", mutates_args=())
def _clipped(
    grad: Tensor, x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None,
    engine: str, y_scale: Tensor, y_zero_point: Tensor, lo: int, hi: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the real output and of a learned output scale, from the sum computed once more:

    t = y / s;  inside where lo <= round(t) + z <= hi;  d y = grad inside;  d s = sum grad (level - t) inside, grad level outside"""
    arithmetic, s32 = engine_named(engine), x_scale * w_scale.reshape(-1)
    out, flat = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device), _rows(grad)
    term = None if bias is None else arithmetic.bias_term(bias, s32).view(1, -1)
    terms = torch.empty(flat.shape[0], 1, device=grad.device)
    *sums, wide = accumulator(_rows(x), x_zero_point, w)
    operands = [flat, *sums, s32.view(1, -1), term, y_scale, y_zero_point]
    sweep(_clip, [_rows(out), terms], operands, arithmetic, lo, hi, wide)
    return out, terms.sum(dtype=torch.float64).float().reshape(y_scale.shape)


def _clip(
    grad: Tensor, total: Tensor, correction: Tensor | None, s32: Tensor, term: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """d y and the terms of d s, summed over rows.   rest: y's scale and zero point, engine, lo, hi"""
    y_scale, y_zero_point, arithmetic, lo, hi, wide = rest
    t = arithmetic.linear(exact(total, correction, wide), s32, term) / y_scale
    rounded = torch.round(t)
    levels = torch.minimum(torch.maximum(rounded, lo - y_zero_point), hi - y_zero_point)
    inside = rounded.eq(levels).to(grad.dtype)
    return grad * inside, ((levels - t * inside) * grad).sum(-1, keepdim=True)


@_clipped.register_fake
def _(grad, x, x_scale, x_zero_point, w, w_scale, bias, engine, y_scale, y_zero_point, lo, hi):
    return torch.empty_like(grad, memory_format=torch.contiguous_format), torch.empty_like(y_scale)

"""Products of codes: exact integer sums forward, gradients from the same codes backward.

    acc = (x_codes - z) w_codes^T                           exact, whichever kernel computes it
    y   = the engine's formula of acc                       bit for bit what the deployed file computes (numerics.engine)
    d x_hat = dy w_hat,  d w_hat = dy^T x_hat,  d b = sum dy   the float layer's, x_hat and w_hat read from codes into a buffer

What the backward pass keeps is codes: a byte per element, shared with every other product of the same tensor. Under autocast the
forward pass stays as it is, and the products of the backward pass run in bfloat16: codes are exact there, only dy is rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qatana.hardware import onednn_leads
from qatana.numerics.coded import Coded, encode_again, masked
from qatana.numerics.engine import Affine
from qatana.numerics.engines import engine as engine_named
from qatana.numerics.integer_sums import exact_float, integer_sum, row_sums
from qatana.numerics.masks import length, pack_mask
from qatana.numerics.openvino import OpenVino
from qatana.numerics.pieces import pieces
from qatana.numerics.workspace import buffer

DYNAMIC = "dynamic"
"""In place of an engine's name: y = f32(acc) * s32, then + bias, as kernels do whose activations are quantized at run time."""


DYNAMIC_ARITHMETIC = OpenVino()
"""Whose float outputs have that formula."""


def reduced_gradients(device: torch.device) -> bool:
    """Whether autocast asks for gradients in bfloat16."""
    kind = device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


def linear(x: Coded, w: Coded, bias: Tensor | None, engine: str) -> Tensor:
    """y = x_hat w_hat^T + b by the engine's formula for float outputs.   x (*batch, K), w (N, K), b (N,) -> float32 (*batch, N).

    Scales: x per tensor, w per channel or tensor. engine: its name, or DYNAMIC."""
    return _linear(*_operands(x, w), bias, engine, reduced_gradients(x.codes.device))


def linear_again(x: Coded, w: Coded, bias: Tensor | None, engine: str) -> Callable[[], Tensor]:
    """What computes `linear`'s output once more, bit for bit, and keeps nothing that its backward pass does not keep.

    Raises, when called: RuntimeError if the weight or the bias has changed since."""
    given = [t for t in (w.source, bias) if t is not None]
    versions = [t._version for t in given]
    x_head, w_codes = (x.codes, x.scale, x.zero_point), None if w.source is not None else w.codes
    scale, source, scheme = w.scale, w.source, w.scheme

    def compute() -> Tensor:
        if [t._version for t in given] != versions:
            raise RuntimeError("a weight or bias was modified in place between the forward and the backward pass")
        codes = w_codes if source is None else encode_again(source, scale, scheme)
        assert codes is not None
        head = (x_head[0], *x_head, codes, codes, scale, None, "")
        return _linear(*head, None if bias is None else bias.detach(), engine, False)

    return compute


def linear_requantized(x: Coded, w: Coded, bias: Tensor | None, engine: str, y: Affine, learned: bool) -> Tensor:
    """y_hat, the engine's requantized output as floats on its grid: float32 (*batch, N).   x, w, bias as in `linear`.

    learned  the scale of y gets LSQ's gradient (the backward pass computes the sum once more instead of keeping it)"""
    head = _operands(x, w)
    return _linear_requantized(*head, bias, engine, *y, x.origin, learned, reduced_gradients(x.codes.device))[0]


def _operands(x: Coded, w: Coded) -> tuple[Any, ...]:
    return x.hat, x.codes, x.scale, x.zero_point, w.hat, w.codes, w.scale, w.source, w.scheme


def accumulated(x: Tensor, zero_point: Tensor, w: Tensor, out: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of acc (M, N) for x (M, K), w (N, K), as exact floats: float32 in `out` (M, N), if given, else new."""
    total = integer_sum(x, w)
    correction = None
    if x.shape[0] and bool(zero_point != 0):
        correction = row_sums(w).mul_(zero_point).to(total.dtype)
    for piece in pieces(total):
        part = total[piece]
        part = part if correction is None else part.sub_(correction)
        yield piece, exact_float(part, None if out is None else out[piece])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@torch.library.custom_op("qatana::coded_linear", mutates_args=())
def _linear(
    x_hat: Tensor, x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w_hat: Tensor, w: Tensor, w_scale: Tensor,
    source: Tensor | None, scheme: str, bias: Tensor | None, engine: str, reduced: bool,
) -> Tensor:  # fmt: skip
    with torch.no_grad():
        s32 = x_scale * w_scale.reshape(-1)
        out = torch.empty((*x.shape[:-1], w.shape[0]), dtype=torch.float32, device=x.device)
        flat, arithmetic = _rows(out), DYNAMIC_ARITHMETIC if engine == DYNAMIC else engine_named(engine)
        term = None if bias is None else arithmetic.bias_term(bias, s32)
        for piece, acc in accumulated(_rows(x), x_zero_point, w, flat):
            arithmetic.linear(acc, s32, term, flat[piece])
    return out


@_linear.register_fake
def _(x_hat, x, x_scale, x_zero_point, w_hat, w, w_scale, source, scheme, bias, engine, reduced):
    return torch.empty((*x.shape[:-1], w.shape[0]), dtype=torch.float32, device=x.device)


def _save_linear(ctx, inputs, output) -> None:
    _, x, x_scale, x_zero_point, _, w, w_scale, source, ctx.scheme, bias, _, ctx.reduced = inputs
    ctx.bias, ctx.encoded = None if bias is None else bias.dtype, source is None
    ctx.save_for_backward(x, x_scale, x_zero_point, w if source is None else source, w_scale)


def _linear_backward(ctx, grad: Tensor):
    x, w, bias = _operand_gradients(ctx, grad, _encoded(ctx, *ctx.saved_tensors))
    return x, None, None, None, w, None, None, None, None, bias, None, None


def _encoded(ctx, x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w: Tensor, w_scale: Tensor) -> tuple[Tensor, ...]:
    return x, x_scale, x_zero_point, w if ctx.encoded else encode_again(w, w_scale, ctx.scheme), w_scale


def _operand_gradients(
    ctx, grad: Tensor, head: tuple[Tensor, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_w, need_b = (ctx.needs_input_grad[i] for i in (0, 4, 9))
    found = torch.ops.qatana.coded_linear_gradients(grad, *head, need_x, need_w, ctx.reduced)
    x, w = (g if need else None for g, need in zip(found, (need_x, need_w), strict=True))
    return x, w, _rows(grad).sum(0).to(ctx.bias) if need_b else None


_linear.register_autograd(_linear_backward, setup_context=_save_linear)


@torch.library.custom_op("qatana::coded_linear_gradients", mutates_args=())
def _gradients(
    grad: Tensor, x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w: Tensor, w_scale: Tensor,
    need_x: bool, need_w: bool, reduced: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """d x_hat (*batch, K) and d w_hat (N, K), float32; empty where not needed."""
    rows, codes = _rows(grad), _rows(x)
    none = torch.empty(0, device=grad.device)
    compute = _in_bfloat16 if reduced else _in_float32
    d_x, d_w = compute(rows, codes, x_scale, x_zero_point, w, w_scale, need_x, need_w)
    return none if d_x is None else d_x.view(x.shape), none if d_w is None else d_w


@_gradients.register_fake
def _(grad, x, x_scale, x_zero_point, w, w_scale, need_x, need_w, reduced):
    empty = {"dtype": torch.float32, "device": grad.device}
    return torch.empty(x.shape if need_x else 0, **empty), torch.empty(w.shape if need_w else 0, **empty)


def _in_float32(grad, x, x_scale, x_zero_point, w, w_scale, need_x: bool, need_w: bool):
    d_x = d_w = None
    if need_x:
        w_hat = buffer("operand", w.shape, torch.float32, w.device)
        scale = w_scale.reshape(-1, 1)
        for piece in pieces(w_hat):
            w_hat[piece] = w[piece]
            w_hat[piece].mul_(scale[piece] if scale.shape[0] > 1 else scale)
        d_x = float_product(grad, w_hat)
    if need_w:
        x_hat = buffer("operand", x.shape, torch.float32, x.device)
        for piece in pieces(x_hat):
            x_hat[piece] = x[piece]
            x_hat[piece].sub_(x_zero_point).mul_(x_scale)
        d_w = float_product(grad.t(), x_hat)
    return d_x, d_w


def float_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, by the faster library of this processor.   a (M, K) and b (K, N) of any strides."""
    if (
        a.device.type == "cpu"
        and onednn_leads()
        and torch.backends.mkldnn.is_available()
        and min(*a.shape, *b.shape) > 0
    ):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b)


def _in_bfloat16(grad, x, x_scale, x_zero_point, w, w_scale, need_x: bool, need_w: bool):
    """Codes are exact in bfloat16: scales stay outside of the products."""
    d_x = d_w = None
    rounded = buffer("gradient", grad.shape, torch.bfloat16, grad.device)
    if need_x:
        for piece in pieces(rounded):
            rounded[piece] = grad[piece] * w_scale.reshape(-1)
        levels = buffer("operand", w.shape, torch.bfloat16, w.device).copy_(w)
        d_x = _to_float32(torch.mm(rounded, levels, out=buffer("product", x.shape, torch.bfloat16, x.device)))
    if need_w:
        rounded.copy_(grad)
        levels = buffer("operand", x.shape, torch.bfloat16, x.device)
        for piece in pieces(levels):
            levels[piece] = x[piece]
            levels[piece].sub_(x_zero_point)
        out = buffer("product", w.shape, torch.bfloat16, w.device)
        d_w = _to_float32(torch.mm(rounded.t(), levels, out=out)).mul_(x_scale)
    return d_x, d_w


def _to_float32(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)


# -- requantized outputs -------------------------------------------------------------------------------------------------
@torch.library.custom_op("qatana::coded_linear_requantized", mutates_args=())
def _linear_requantized(
    x_hat: Tensor, x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w_hat: Tensor, w: Tensor, w_scale: Tensor,
    source: Tensor | None, scheme: str, bias: Tensor | None, engine: str,
    y_scale: Tensor, y_zero_point: Tensor, lo: int, hi: int, origin: int,
    learned: bool, reduced: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y_hat and where it was inside its range (no bits where the scale is learned)."""
    with torch.no_grad():
        y, arithmetic = Affine(y_scale, y_zero_point, lo, hi), engine_named(engine)
        s32 = x_scale * w_scale.reshape(-1)
        term = None if bias is None else arithmetic.bias_term(bias, s32)
        out = torch.empty((*x.shape[:-1], w.shape[0]), dtype=torch.float32, device=x.device)
        flat, leading = _rows(out), (1,) * (x.ndim - 2)
        inside = torch.ones(0 if learned else out.shape, dtype=torch.uint8, device=x.device)
        mask = inside.view(0 if learned else flat.shape)
        for piece, acc in accumulated(_rows(x), x_zero_point, w):
            # formulas ask whether the product is a matrix
            levels = arithmetic.linear_levels(acc.view(*leading, *acc.shape), s32, term, y, x_zero_point + origin)
            levels = levels.view(acc.shape)
            if not learned and touches_ends(levels, y):
                mark_inside(mask[piece], arithmetic.linear(acc, s32, term), y)
            torch.mul(levels, y_scale, out=flat[piece])
    return out, pack_mask(inside)


def mark_inside(mask: Tensor, value: Tensor, y: Affine) -> None:
    """Write 0 into `mask` (uint8 ones) where the real output `value`, rounded, leaves the range of y."""
    rounded = torch.round(value / y.scale).add_(y.zero_point)
    mask.copy_(rounded.eq(rounded.clamp(y.lo, y.hi)))


def touches_ends(levels: Tensor, y: Affine) -> bool:
    """Whether some level is the lowest or the highest: else nothing can have been clipped."""
    if not levels.numel():
        return False
    low, high = torch.aminmax(levels)
    return bool((low <= y.lo - y.zero_point) | (high >= y.hi - y.zero_point))


@_linear_requantized.register_fake
def _(x_hat, x, x_scale, x_zero_point, w_hat, w, w_scale, source, scheme, bias, engine,
      y_scale, y_zero_point, lo, hi, origin, learned, reduced):  # fmt: skip
    shape = (*x.shape[:-1], w.shape[0])
    count = 0 if learned else length(math.prod(shape))
    return (
        torch.empty(shape, dtype=torch.float32, device=x.device),
        torch.empty(count, dtype=torch.uint8, device=x.device),
    )


def _save_requantized(ctx, inputs, output) -> None:
    (_, x, x_scale, x_zero_point, _, w, w_scale, source, ctx.scheme, bias, ctx.engine,
     y_scale, y_zero_point, ctx.lo, ctx.hi, _, ctx.learned,
     ctx.reduced) = inputs  # fmt: skip
    ctx.bias, ctx.encoded, ctx.order = None if bias is None else bias.dtype, source is None, list(range(x.ndim))
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    more = (bias, y_scale, y_zero_point) if ctx.learned else (output[1],)
    ctx.save_for_backward(x, x_scale, x_zero_point, w if source is None else source, w_scale, *more)


def _requantized_backward(ctx, grad: Tensor | None, _: Tensor | None):
    if grad is None:
        return (None,) * 18
    saved = ctx.saved_tensors  # once: gradient checkpointing unpacks each tensor a single time
    head, more, d_scale = _encoded(ctx, *saved[:5]), saved[5:], None
    if ctx.learned:
        bounds = (ctx.engine, more[1], more[2], ctx.lo, ctx.hi)
        grad, d_scale = torch.ops.qatana.coded_linear_clipped(grad, *head, more[0], *bounds)
    else:
        grad = masked(grad, more[0], ctx.order)
    assert grad is not None
    x, w, bias = _operand_gradients(ctx, grad, head)
    return x, None, None, None, w, None, None, None, None, bias, None, d_scale, *(None,) * 6


_linear_requantized.register_autograd(_requantized_backward, setup_context=_save_requantized)


@torch.library.custom_op("qatana::coded_linear_clipped", mutates_args=())
def _clipped(
    grad: Tensor, x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None,
    engine: str, y_scale: Tensor, y_zero_point: Tensor, lo: int, hi: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the real output and of a learned output scale, from the sum computed once more:

    t = y / s;  inside where lo <= round(t) + z <= hi;  d y = grad inside;  d s = sum grad (level - t) inside, grad level outside"""
    y, arithmetic = Affine(y_scale, y_zero_point, lo, hi), engine_named(engine)
    out, flat = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device), _rows(grad)
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    s32 = x_scale * w_scale.reshape(-1)
    term = None if bias is None else arithmetic.bias_term(bias, s32)
    for piece, acc in accumulated(_rows(x), x_zero_point, w):
        t = arithmetic.linear(acc, s32, term) / y_scale
        rounded = torch.round(t)
        levels = rounded.clamp(y.lo - y.zero_point, y.hi - y.zero_point)
        inside = rounded.eq(levels)
        _rows(out)[piece] = flat[piece] * inside
        total += ((levels - t * inside) * flat[piece]).sum(dtype=torch.float64)
    return out, total.to(torch.float32).reshape(y_scale.shape)


@_clipped.register_fake
def _(grad, x, x_scale, x_zero_point, w, w_scale, bias, engine, y_scale, y_zero_point, lo, hi):
    return torch.empty_like(grad, memory_format=torch.contiguous_format), torch.empty_like(y_scale)

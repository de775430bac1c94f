"""Convolutions on codes: exact integer sums forward, gradients from the same codes backward, as `products` has them for matrices.

acc = conv(x_codes - z, w_codes),    y = f32(acc) * (s_x s_w m) + b       (m: a factor per output channel, BatchNorm's; none: 1)
y_hat = the engine's requantization of acc, behind a ReLU if asked for    bit for bit what the deployed file computes
d x_hat, d w_hat: the float convolution's, of x_hat and w_hat m;   d m = sum over w_hat of w_hat * conv(x_hat, dy) per channel"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qatana.numerics.coded import Coded, decoded, masked, memory_order, origin_of, place
from qatana.numerics.engine import Affine
from qatana.numerics.engines import engine as engine_named
from qatana.numerics.fused import sweep
from qatana.numerics.integer_sums import Geometry, convolution_sum
from qatana.numerics.masks import length, pack_mask
from qatana.numerics.product_gradients import reduced_gradients, rounded
from qatana.numerics.products import is_inside
from qatana.numerics.workspace import buffer

Shape = Sequence[int]


def convolution(x: Coded, w: Coded, bias: Tensor | None, factor: Tensor | None, geometry: Geometry) -> Tensor:
    """y = conv(x_hat, w_hat) * factor + b in float32.   x (B, C, *space), w (N, C / groups, *kernel), factor and b (N,) or None.

    Scales: x per tensor, w per channel or tensor. y lies in memory as x does (channels last or not)."""
    return _conv(*_operands(x, w), bias, factor, *geometry, reduced_gradients(x.codes.device))


def convolution_requantized(
    x: Coded, w: Coded, bias: Tensor | None, geometry: Geometry, engine: str, y: Affine, relu: bool
) -> tuple[Tensor, Tensor]:
    """Place and codes (minus their origin) of the engine's requantized output, behind a ReLU. The scale of y gets no gradient."""
    head = _operands(x, w)
    return _requantized(*head, bias, *geometry, engine, *y, relu, reduced_gradients(x.codes.device))[:2]


def convolution_again(
    x: Coded, w: Coded, bias: Tensor | None, factor: Tensor | None, geometry: Geometry
) -> Callable[[], Tensor]:
    """What computes `convolution`'s output once more, bit for bit, from what its backward pass keeps anyway."""
    rest = [None if t is None else t.detach() for t in (bias, factor)]
    head = (x.codes, x.codes, x.scale, x.zero_point, w.codes, w.codes, w.scale)
    return lambda: _conv(*head, *rest, *geometry, False)


def _operands(x: Coded, w: Coded) -> tuple[Any, ...]:
    return x.hat, x.codes, x.scale, x.zero_point, w.hat, w.codes, w.scale


def _tail(values: Tensor, ndim: int) -> Tensor:
    """Values per output channel as they broadcast over an output."""
    return values.reshape(-1, *(1,) * (ndim - 2))


def _channels_last(x: Tensor) -> Tensor:
    """x in channels-last memory, which oneDNN's kernels are faster in, forth and back included."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _output(x: Tensor, w: Tensor, g: Geometry, dtype: torch.dtype = torch.float32) -> Tensor:
    space = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], w.shape[2:], g.stride, g.padding, g.dilation, strict=True)
    ]
    shape = (x.shape[0], w.shape[0], *space)
    if _is_channels_last(x):
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    return torch.empty(shape, dtype=dtype, device=x.device)


@torch.library.custom_op("qatana::coded_conv", mutates_args=())
def _conv(
    x_hat: Tensor, x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w_hat: Tensor, w: Tensor, w_scale: Tensor,
    bias: Tensor | None, factor: Tensor | None, stride: list[int], padding: list[int], dilation: list[int], groups: int,
    reduced: bool,
) -> Tensor:  # fmt: skip
    g = Geometry(stride, padding, dilation, groups)
    acc = convolution_sum(_channels_last(x), x_zero_point, w, g)
    scale = x_scale * w_scale.reshape(-1)
    scale = scale if factor is None else scale * factor
    reusable = acc.dtype == torch.float32 and acc.stride() == _output(x, w, g).stride()  # memory that is fresh already
    out = acc if reusable else _output(x, w, g)
    order = memory_order(out)
    operands = [acc.permute(order), *(_per_channel(v, order) for v in (scale, bias))]
    sweep(_scaled, [out.permute(order)], operands)
    return out


def _per_channel(values: Tensor | None, order: list[int]) -> Tensor | None:
    """Values per output channel as they broadcast over an output whose dimensions are in this order."""
    return None if values is None else _tail(values, len(order)).unsqueeze(0).permute(order)


def _scaled(acc: Tensor, scale: Tensor, shift: Tensor | None) -> tuple[Tensor]:
    value = acc.float() * scale
    return (value if shift is None else value + shift,)


@_conv.register_fake
def _(x_hat, x, x_scale, x_zero_point, w_hat, w, w_scale, bias, factor, stride, padding, dilation, groups, reduced):
    return _output(x, w, Geometry(stride, padding, dilation, groups))


def _save_conv(ctx, inputs, output) -> None:
    _, x, x_scale, x_zero_point, _, w, w_scale, bias, factor, *geometry, ctx.reduced = inputs
    ctx.geometry, ctx.bias = geometry, None if bias is None else bias.dtype
    ctx.save_for_backward(x, x_scale, x_zero_point, w, w_scale, factor)


def _conv_backward(ctx, grad: Tensor):
    need_x, need_w, need_b, need_f = (ctx.needs_input_grad[i] for i in (0, 4, 7, 8))
    d_x, d_w, d_f = torch.ops.qatana.coded_conv_gradients(
        grad, *ctx.saved_tensors, *ctx.geometry, need_x, need_w, need_f, ctx.reduced
    )
    bias = _channel_sum(grad).to(ctx.bias) if need_b else None
    found = (
        d_x if need_x else None,
        None,
        None,
        None,
        d_w if need_w else None,
        None,
        None,
        bias,
        d_f if need_f else None,
    )
    return *found, *(None,) * 5


def _channel_sum(grad: Tensor) -> Tensor:
    return grad.sum([d for d in range(grad.ndim) if d != 1])


_conv.register_autograd(_conv_backward, setup_context=_save_conv)


@torch.library.custom_op("qatana::coded_conv_gradients", mutates_args=())
def _gradients(
    grad: Tensor, x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w: Tensor, w_scale: Tensor, factor: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
    need_x: bool, need_w: bool, need_factor: bool, reduced: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d x_hat, d w_hat, d factor, float32; empty where not needed."""
    none = [torch.empty(0, device=grad.device) for _ in range(3)]
    if not grad.numel():
        return (
            torch.zeros(x.shape, device=x.device),
            torch.zeros(w.shape, device=x.device),
            torch.zeros(w.shape[0], device=x.device),
        )
    geometry = (stride, padding, dilation, False, [0] * len(stride), groups)
    dtype, scale, codes = torch.bfloat16 if reduced else torch.float32, w_scale.reshape(-1), _channels_last(x)
    per_channel = scale if factor is None else scale * factor
    upstream = _channels_last(grad)
    scaled = plain = upstream
    if reduced:  # codes are exact in bfloat16: the scale goes to the gradient, which is rounded anyway
        scaled, plain = (torch.empty_like(upstream, dtype=dtype) for _ in range(2))
        order = memory_order(upstream)
        outs, operands = (
            [t.permute(order) for t in (scaled, plain)],
            [upstream.permute(order), _per_channel(per_channel, order)],
        )
        sweep(rounded, outs, operands)
    if need_x:
        weight = _decoded(w, None if reduced else per_channel, dtype)
        d_x = _convolution_backward(scaled, _in_layout_of(codes, dtype), weight, geometry, 0).float()
        none[0] = d_x if _is_channels_last(x) else d_x.contiguous()
    if need_w or need_factor:
        levels, order = _in_layout_of(codes, dtype), memory_order(codes)
        sweep(decoded, [levels.permute(order)], [codes.permute(order), None, x_zero_point])
        shape = buffer("weight", w.shape, dtype, w.device)
        raw = _convolution_backward(plain, levels, shape, geometry, 1).float().mul_(x_scale)
        if need_factor:
            assert factor is not None
            none[2] = (raw * w).flatten(1).sum(1) * scale
        none[1] = raw if factor is None else raw.mul_(_tail(factor, w.ndim + 1))
        none[1] = none[1].contiguous()
    return none[0], none[1], none[2]


def _in_layout_of(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """A buffer of the shape and memory order of dense codes."""
    order = memory_order(codes)
    back = sorted(range(codes.ndim), key=order.__getitem__)
    return buffer("levels", [codes.shape[d] for d in order], dtype, codes.device).permute(back)


def _decoded(w: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = buffer("weight", w.shape, dtype, w.device).copy_(w)
    return out if scale is None else out.mul_(_tail(scale, w.ndim + 1))


def _convolution_backward(grad: Tensor, x: Tensor, w: Tensor, geometry: tuple[Any, ...], which: int) -> Tensor:
    wanted = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(grad, x, w, None, *geometry, wanted)[which]


@_gradients.register_fake
def _(grad, x, x_scale, x_zero_point, w, w_scale, factor, stride, padding, dilation, groups, need_x, need_w, need_factor,
      reduced):  # fmt: skip
    of = {"dtype": torch.float32, "device": grad.device}
    d_x = torch.empty_like(x, dtype=torch.float32) if need_x else torch.empty(0, **of)
    d_w = torch.empty(w.shape if need_w or need_factor else 0, **of)
    return d_x, d_w, torch.empty(w.shape[0] if need_factor else 0, **of)


# -- requantized outputs ---------------------------------------------------------------------------------------------------
@torch.library.custom_op("qatana::coded_conv_requantized", mutates_args=())
def _requantized(
    x_hat: Tensor, x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w_hat: Tensor, w: Tensor, w_scale: Tensor,
    bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int], groups: int, engine: str,
    y_scale: Tensor, y_zero_point: Tensor, lo: int, hi: int, relu: bool, reduced: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Place, codes, and where the convolution's own output was inside the range (and above 0, with a ReLU), in memory order."""
    with torch.no_grad():
        g, arithmetic = Geometry(stride, padding, dilation, groups), engine_named(engine)
        acc, out = convolution_sum(_channels_last(x), x_zero_point, w, g), _output(x, w, g, torch.int8)
        s32, order = x_scale * w_scale.reshape(-1), memory_order(out)
        term = None if bias is None else arithmetic.bias_term(bias, s32)
        codes = out.permute(order)
        inside = torch.empty(codes.shape, dtype=torch.uint8, device=x.device)
        operands = [acc.permute(order), _per_channel(s32, order), _per_channel(term, order), y_scale, y_zero_point]
        sweep(_levels, [codes, inside], operands, arithmetic, lo, hi, relu, compile=arithmetic.fuses)
    return place(out), out, pack_mask(inside)


def _levels(acc: Tensor, s32: Tensor, term: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """Codes, minus their origin, and where they are inside.   rest: y's scale and zero point, engine, lo, hi, relu"""
    y_scale, y_zero_point, arithmetic, lo, hi, relu = rest
    y = Affine(y_scale, y_zero_point, lo, hi)
    levels, value = arithmetic.conv_levels(acc, s32, term, y), arithmetic.linear(acc, s32, term)
    inside = is_inside(value, y)
    if relu:
        levels, inside = levels.clamp(min=0), inside.logical_and(value > 0)
    return (levels + (y_zero_point - origin_of(lo))).to(torch.int8), inside.to(torch.int32)


@_requantized.register_fake
def _(x_hat, x, x_scale, x_zero_point, w_hat, w, w_scale, bias, stride, padding, dilation, groups, engine, y_scale,
      y_zero_point, lo, hi, relu, reduced):  # fmt: skip
    out = _output(x, w, Geometry(stride, padding, dilation, groups), torch.int8)
    return place(out), out, torch.empty(length(math.prod(out.shape)), dtype=torch.uint8, device=x.device)


def _save_requantized(ctx, inputs, output) -> None:
    _, x, x_scale, x_zero_point, _, w, w_scale, bias, *geometry, _, _, _, _, _, _, ctx.reduced = inputs
    ctx.geometry, ctx.bias = geometry, None if bias is None else bias.dtype
    ctx.order = memory_order(output[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, x_scale, x_zero_point, w, w_scale, output[2])


def _requantized_backward(ctx, grad: Tensor | None, *_: Tensor | None):
    if grad is None:
        return (None,) * 19
    *head, inside = ctx.saved_tensors
    grad = masked(grad, inside, ctx.order)
    need_x, need_w, need_b = (ctx.needs_input_grad[i] for i in (0, 4, 7))
    d_x, d_w, _ = torch.ops.qatana.coded_conv_gradients(
        grad, *head, None, *ctx.geometry, need_x, need_w, False, ctx.reduced
    )
    bias = _channel_sum(grad).to(ctx.bias) if need_b else None
    return d_x if need_x else None, None, None, None, d_w if need_w else None, None, None, bias, *(None,) * 11


_requantized.register_autograd(_requantized_backward, setup_context=_save_requantized)

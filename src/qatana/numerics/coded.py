"""Fake quantization that keeps codes instead of floats.

    x_hat = (code - zero_point) * scale         what the layer multiplies; it is never written as a float tensor
    d x_hat / d x = 1 inside the range, 0 outside;    d x_hat / d scale as in `by_scheme`         (straight-through, LSQ)

A Coded tensor is x_hat as one byte per element. Its place in the autograd graph is `hat`, a tensor of x's shape without storage: an
operator on Coded operands reads the codes and sends the gradient of x_hat to `hat`. For the backward pass one bit per element is
kept, none where a range cannot clip, and x itself only where a learned scale needs it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qatana.errors import SchemeError
from qatana.numerics.by_scheme import needs_mask, parameters_of, solve, stack_of
from qatana.numerics.engine import Affine, Engine
from qatana.numerics.engines import engine as engine_named
from qatana.numerics.formats import IntFormat
from qatana.numerics.fused import sweep
from qatana.numerics.masks import apply_mask, bits_of, everywhere, length, nothing_clipped, pack_mask, sweep_blocks
from qatana.numerics.scales import Parameters
from qatana.numerics.scheme import Scheme


class Coded(NamedTuple):
    """A fake-quantized tensor, x_hat = (codes - zero_point) * scale.

    hat         its place in the graph: x's shape, float32, stride 0; holds no numbers
    codes       int8, x's shape
    scale       float32, of the granularity's scale shape; the gradient of a learned one goes through hat
    zero_point  float32 integers of the same shape
    format      the integer format
    origin      codes + origin are the format's own codes: 128 for unsigned activations, which integer products take as signed"""

    hat: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    format: IntFormat
    origin: int

    def levels(self) -> Tensor:
        """codes - zero_point, float32: a new tensor."""
        return self.codes.float() - self.zero_point

    def own_codes(self) -> Tensor:
        """The format's codes in its storage dtype."""
        return self.codes if not self.origin else (self.codes.to(torch.int16) + self.origin).to(self.format.dtype)


def origin_of(lo: int) -> int:
    """What activations' codes lack, by the format's lowest one: unsigned codes are shifted so that they fit int8."""
    return 0 if lo < 0 else 128


@lru_cache(maxsize=1024)
def _scheme(text: str) -> Scheme:
    return Scheme.parse(text)


def place(x: Tensor) -> Tensor:
    """A tensor of x's shape without storage."""
    return torch.zeros((), dtype=torch.float32, device=x.device).expand(x.shape)


def memory_order(x: Tensor) -> list[int]:
    """The order of x's dimensions in memory (that of its shape, where it has gaps or overlaps)."""
    order = sorted(range(x.ndim), key=lambda d: (-x.stride(d), d))
    return order if x.permute(order).is_contiguous() else list(range(x.ndim))


def in_memory_order(x: Tensor) -> tuple[Tensor, list[int]]:
    """x with its dimensions in memory order, contiguous: a transposed or channels-last tensor is walked as it lies."""
    order = memory_order(x)
    return x.permute(order).contiguous(), order


def _like(flat: Tensor, dense: Tensor, order: list[int]) -> Tensor:
    """flat values in memory order -> the tensor."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return flat.view(dense.shape).permute(back)


# -- activations: one scale per tensor, the engine's rounding -----------------------------------------------------------
@torch.library.custom_op("qatana::encode", mutates_args=())
def _encode(
    x: Tensor, scale: Tensor, zero_point: Tensor, scheme: str, engine: str, learned: bool, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    format = _scheme(scheme).integer
    y = Affine(scale, zero_point, format.lo, format.hi)
    dense, order = in_memory_order(x)
    flat = dense.reshape(-1)
    codes = torch.empty(flat.shape, dtype=torch.int8, device=x.device)
    inside = everywhere(0 if learned else flat.numel(), x.device)
    ends = torch.stack(torch.aminmax(flat)).float() if flat.numel() else scale.new_zeros(2)
    arithmetic, mask = engine_named(engine), not (learned or (not relu and _fits(ends, y)))
    constants = (arithmetic, format.lo, format.hi, relu, mask)
    sweep_blocks(
        _codes, codes, inside if mask else None, [flat], [scale, zero_point], *constants, compile=arithmetic.fuses
    )
    # Codes have no NaN: a tensor that holds one reads back as NaN as a whole, so that losses and their watchers see it.
    return place(x), _like(codes, dense, order), inside, torch.where(ends[0].isnan(), ends[0], scale)


def _codes(
    x: Tensor, scale: Tensor, zero_point: Tensor, arithmetic: Engine, lo: int, hi: int, relu: bool, mask: bool
) -> tuple[Tensor, ...]:
    """Codes, minus their origin, of blocks (R, 8, 64), and the bits of where they are inside."""
    found, where = arithmetic.encode(x, Affine(scale, zero_point, lo, hi), relu, mask)
    codes = (found - origin_of(lo)).to(torch.int8)
    return (codes,) if where is None else (codes, bits_of(where))


def _fits(ends: Tensor, y: Affine) -> bool:
    """Whether no element leaves the range, by the smallest and the largest. A GPU is not asked, which would make the host wait."""
    if ends.device.type != "cpu":
        return False
    rounded = torch.round(ends / y.scale).add_(y.zero_point)
    return bool((rounded[0] >= y.lo) & (rounded[1] <= y.hi))


@_encode.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: str, engine: str, learned: bool, relu: bool):
    dense, order = in_memory_order(x)
    codes = torch.empty(x.numel(), dtype=torch.int8, device=x.device)
    bits = torch.empty(0 if learned else length(x.numel()), dtype=torch.uint8, device=x.device)
    return place(x), _like(codes, dense, order), bits, torch.empty_like(scale)


def _save_encode(ctx, inputs, output) -> None:
    x, scale, zero_point, ctx.scheme, _, ctx.learned, _ = inputs
    _, codes, inside, used = output
    ctx.dtype, ctx.order = x.dtype, memory_order(x)
    ctx.mark_non_differentiable(codes, inside, used)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*((x, scale, zero_point) if ctx.learned else (inside,)))


def _encode_backward(ctx, grad: Tensor | None, *_: Tensor | None):
    none = (None,) * 5
    if grad is None:
        return None, None, *none
    if ctx.learned:
        x, scale, zero_point = ctx.saved_tensors
        found = torch.ops.qatana.fake_quantize_gradients(grad.to(x.dtype), x, scale, zero_point, ctx.scheme)
        return *found, *none
    return masked(grad, ctx.saved_tensors[0], ctx.order).to(ctx.dtype), None, *none


_encode.register_autograd(_encode_backward, setup_context=_save_encode)


def encode(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme, engine: str, relu: bool = False) -> Coded:
    """An activation as codes: those of `Engine.levels`.   x (*shape) of any float dtype and strides; scale, zero_point ().

    Computes in float32 and keeps 1 bit per element (and x where the scale is learned).
    relu  encode max(x, 0); the bits then hold where x > 0, too, so that nothing else is kept for the ReLU. Not with a learned scale."""
    learned = scale.requires_grad
    if relu and learned:
        raise SchemeError("a ReLU and a learned scale cannot be one operator: apply the ReLU before")
    hat, codes, _, used = _encode(x, scale, zero_point, scheme.text, engine, learned, relu)
    origin = origin_of(scheme.integer.lo)
    return Coded(hat, codes, used, zero_point - origin, scheme.integer, origin)


@torch.library.custom_op("qatana::decode", mutates_args=())
def _decode(hat: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    dense, order = in_memory_order(codes)
    out = torch.empty(dense.numel(), dtype=torch.float32, device=codes.device)
    sweep(decoded, [out], [dense.reshape(-1), scale, zero_point])
    return _like(out, dense, order)


def decoded(codes: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> tuple[Tensor]:
    """(code - zero_point) * scale, float32; None: 0 and 1."""
    levels = codes.float() if zero_point is None else codes.float() - zero_point
    return (levels if scale is None else levels * scale,)


@_decode.register_fake
def _(hat: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    dense, order = in_memory_order(codes)
    return _like(torch.empty(codes.numel(), dtype=torch.float32, device=codes.device), dense, order)


_decode.register_autograd(lambda ctx, grad: (grad, None, None, None))


def decode(x: Coded) -> Tensor:
    """x_hat as floats, float32. Keeps nothing for the backward pass.   Scale and zero point per tensor."""
    return _decode(x.hat, x.codes, x.scale, x.zero_point)


# -- weights: scales per channel, tensor or group, from the values or given -----------------------------------------------
@torch.library.custom_op("qatana::encode_weight", mutates_args=())
def _encode_weight(
    w: Tensor, scale: Tensor | None, offset: Tensor | None, scheme: str, learned: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = _scheme(scheme)
    grid, granularity, dims = found.integer_grid, found.granularity, found.granularity.stack_dims()
    dense = w.contiguous()
    stack = stack_of(dense, found)
    own = scale is None or offset is None
    p = None if own else parameters_of(found, scale, offset)  # type: ignore[arg-type]
    p = solve(dense, found) if own and (dims[0] == 0 or not stack.numel()) else p
    codes = torch.empty(stack.shape, dtype=torch.int8, device=w.device)
    masked = not learned and needs_mask(found, own)
    inside = torch.empty(stack.shape if masked else (0,), dtype=torch.uint8, device=w.device)
    scales = torch.empty(grid.field_shape("scale", stack.shape, dims), dtype=torch.float32, device=w.device)
    per_row = dims[0] != 0
    outs = [codes, *([inside] if masked else []), *([scales] if own and per_row else [])]
    sweep(_weight_codes, outs, [stack, *(() if p is None else p)], grid, dims, masked, own and per_row)
    scale = scales if p is None else p.scale if stack.numel() else scales.fill_(1)
    scale = torch.where(dense.sum().isnan(), torch.nan, scale)  # codes have no NaN: the scale carries it
    return (
        place(w),
        granularity.unview(codes, w.shape),
        pack_mask(inside),
        scale.reshape(_scale_shape(w, found)).clone(),
    )


def _weight_codes(stack: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Codes of blocks, where they are inside, and the scales where they are the blocks' own.   rest: the parameters, if given, grid,
    dims, whether to tell where inside, whether to give scales"""
    *given, grid, dims, mask, scales = rest
    view, own = stack.float(), not given
    p = Parameters(*given) if given else grid.solve(view, dims)
    t = grid.scaled(view, p)
    where = grid.round_(t, p, fits=own, mask=mask)
    return t.to(torch.int8), *((where,) if where is not None else ()), *((p.scale,) if scales else ())


def _scale_shape(w: Tensor, scheme: Scheme) -> tuple[int, ...]:
    return scheme.granularity.scale_shape(w.shape)


@_encode_weight.register_fake
def _(w: Tensor, scale: Tensor | None, offset: Tensor | None, scheme: str, learned: bool):
    found = _scheme(scheme)
    masked = not learned and needs_mask(found, scale is None)
    device = w.device
    return (
        place(w),
        torch.empty(w.shape, dtype=torch.int8, device=device),
        torch.empty(length(w.numel()) if masked else 0, dtype=torch.uint8, device=device),
        torch.empty(_scale_shape(w, found), dtype=torch.float32, device=device),
    )


def _save_weight(ctx, inputs, output) -> None:
    w, scale, offset, ctx.scheme, ctx.learned = inputs
    ctx.dtype, ctx.order = w.dtype, list(range(w.ndim))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*((w, scale, offset) if ctx.learned else (output[2],)))


def _weight_backward(ctx, grad: Tensor | None, *_: Tensor | None):
    if grad is None:
        return None, None, None, None, None
    if ctx.learned:
        w, scale, offset = ctx.saved_tensors
        found = torch.ops.qatana.fake_quantize_gradients(grad.to(w.dtype), w, scale, offset, ctx.scheme)
        return *found, None, None, None
    return masked(grad, ctx.saved_tensors[0], ctx.order).to(ctx.dtype), None, None, None, None


_encode_weight.register_autograd(_weight_backward, setup_context=_save_weight)


def encode_weight(w: Tensor, scheme: Scheme, scale: Tensor | None = None, zero_point: Tensor | None = None) -> Coded:
    """A weight as levels (zero point 0), by a symmetric integer scheme.   w (*shape) of any float dtype and strides.

    scale, zero_point  of `granularity.scale_shape(w.shape)`; None: from the values of w themselves
    Raises: SchemeError for schemes whose codes are no integers around one zero point."""
    if not scheme.symmetric:
        raise SchemeError(f"'{scheme}': a weight in an integer product has zero point 0; use symmetric=True")
    learned = scale is not None and scale.requires_grad
    hat, codes, _, used = _encode_weight(w, scale, zero_point, scheme.text, learned)
    return Coded(hat, codes, used, torch.zeros_like(used), scheme.integer, scheme.zero_point)


def encode_rows(x: Tensor, scheme: Scheme) -> Coded:
    """An activation as levels (zero point 0), with a scale for each row, from its values.   x (*batch, K) of any float dtype."""
    hat, codes, _, used = _encode_weight(x, None, None, scheme.text, False)
    return Coded(hat, codes, used, torch.zeros_like(used), scheme.integer, scheme.zero_point)


# -- both ------------------------------------------------------------------------------------------------------------------
@torch.library.custom_op("qatana::apply_mask", mutates_args=())
def _apply_mask(grad: Tensor, inside: Tensor, order: list[int]) -> Tensor:
    """grad, 0 where bits of `inside`, in memory order of the encoded tensor, are 0."""
    dense = grad.permute(order)
    return _like(apply_mask(dense.contiguous().reshape(-1), inside), dense, order)


@_apply_mask.register_fake
def _(grad: Tensor, inside: Tensor, order: list[int]) -> Tensor:
    return _like(grad.new_empty(grad.numel()), grad.permute(order), order)


def masked(grad: Tensor, inside: Tensor, order: list[int]) -> Tensor:
    """grad, 0 where bits of `inside` (in the memory order of the encoded tensor) are 0; grad itself where none are or there are none."""
    if type(inside) is Tensor and not torch.compiler.is_compiling() and nothing_clipped(inside):  # no traced tensor
        return grad
    return torch.ops.qatana.apply_mask(grad, inside, order) if inside.shape[0] else grad

"""Fake quantization by a scheme: x_hat in x's dtype and shape, with its gradient, for every format.

    x_hat = values(codes(x))                                        bit for bit, float32 inside, cast to x's dtype at the end
    d x_hat / d x = 1 where x was not clipped, 0 where it was        (straight-through; the scale counts as constant)
    d x_hat / d scale = level - t inside, level outside              (learned scales; LSQ, Esser et al. 2020, eq. 3)

Memory: the result, and one byte per element where something can clip; with ranges that are the elements' own nothing is saved.
Speed: the tensor is walked in pieces that stay in the processor's cache, with in-place steps. The operators are opaque to
torch.compile and torch.export: one call in the graph, the same bits as in eager mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qatana.errors import DataError, SchemeError
from qatana.numerics.formats import GgufFormat
from qatana.numerics.fused import sweep
from qatana.numerics.grid import Grid, IntGrid, RangeGrid
from qatana.numerics.pieces import pieces
from qatana.numerics.scales import Parameters
from qatana.numerics.scheme import Scheme


@lru_cache(maxsize=1024)
def _scheme(text: str) -> Scheme:
    return Scheme.parse(text)


def stack_of(x: Tensor, scheme: Scheme) -> Tensor:
    """The stack that the scheme's equations see. GGUF types whose blocks form rows of 256 keep a row together."""
    return x.reshape(stack_shape(x.shape, scheme)) if scheme.is_gguf else scheme.granularity.stack(x)


def stack_shape(shape: Sequence[int], scheme: Scheme) -> tuple[int, ...]:
    """The shape of the stack of a tensor of `shape`."""
    format = scheme.format
    if isinstance(format, GgufFormat):
        return math.prod(shape) // format.row, format.row // format.block, format.block
    return scheme.granularity.stack_shape(shape)


def part_of(p: Parameters, piece: slice, rows: int) -> Parameters:
    """The parameters of a piece: those that go along the first dimension are cut like it."""
    return p.__class__(*(v[piece] if v.ndim and v.shape[0] == rows and rows > 1 else v for v in p))


def solve(x: Tensor, scheme: Scheme) -> Parameters:
    """Parameters of a whole tensor, shaped for its stack. Walks in pieces; only the statistics of the blocks stay."""
    grid, granularity = scheme.grid, scheme.granularity
    stack, dims = stack_of(x, scheme), granularity.stack_dims()
    if not stack.numel():
        return grid.solve(torch.zeros([max(1, n) for n in stack.shape], device=x.device), dims)
    if dims[0] == 0 or grid.whole:
        return grid.solve(stack, dims)
    if isinstance(grid, RangeGrid):
        found = [grid.statistics(stack[piece].float(), dims) for piece in pieces(stack)]
        return grid.parameters(*(torch.cat(part) for part in zip(*found, strict=True)))
    parts = [grid.solve(stack[piece].float(), dims) for piece in pieces(stack)]
    return parts[0].__class__(*(torch.cat(part) if part[0].ndim else part[0] for part in zip(*parts, strict=True)))


def refuse_not_finite(x: Tensor) -> None:
    """Raise DataError if x holds NaN or infinity. The sum tells, unless it overflows by itself: then every element is looked at."""
    if bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all()):
        return
    kind = "NaN" if bool(torch.isnan(x).any()) else "infinite values"
    raise DataError(
        f"a tensor of shape {tuple(x.shape)} holds {kind}: quantization needs finite numbers; look at what computed it"
    )


def refuse_overflow(p: Parameters, x: Tensor) -> None:
    """Raise DataError if a scale or an offset of x is infinite in the type that stores it."""
    if not bool(torch.isfinite(p.scale).all() and torch.isfinite(p.offset).all()):
        most = float(x.abs().max())
        raise DataError(
            f"a tensor of shape {tuple(x.shape)} holds values up to {most:.3g}, whose scale overflows; rescale it"
        )


def walk(
    x: Tensor, scheme: Scheme, given: Parameters | None, *, check: bool = False, mask: bool = True
) -> tuple[Tensor, Tensor]:
    """(x_hat, where inside); the second is empty where nothing can clip or the gradient passes anyway, and without `mask`.

    given  the parameters; None: those of x itself.   check: refuse numbers that are not finite"""
    grid, granularity, dims = scheme.grid, scheme.granularity, scheme.granularity.stack_dims()
    own = given is None
    stack = stack_of(x, scheme)
    local = own and grid.local and dims[0] != 0
    p = given if given is not None else None if local else solve(x, scheme)
    mask = mask and needs_mask(scheme, own)
    if check:
        refuse_not_finite(x)
    if check and p is not None:
        refuse_overflow(p, x)
    out = torch.empty(stack.shape, dtype=x.dtype, device=x.device)
    inside = torch.empty(stack.shape if mask else (0,), dtype=torch.bool, device=x.device)
    # By way of bytes: compiled loops turn floats into bools one by one.
    outs, constants = [out, *([inside.view(torch.uint8)] if mask else [])], (type(p), grid, dims, own, mask)
    sweep(_fake_quantized, outs, [stack, *(() if p is None else p)], *constants, compile=compiles(grid))
    out = granularity.unview(out, x.shape)
    return out, granularity.unview(inside, x.shape) if mask else inside


def compiles(grid: Grid) -> bool:
    """Whether the equations of a grid are worth a compiled loop: those of integers are plain arithmetic."""
    return isinstance(grid, IntGrid)


def _fake_quantized(stack: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """x_hat of blocks, and where they are inside.   rest: the parameters, if given, their type, grid, dims, own, mask"""
    *given, kind, grid, dims, own, mask = rest
    view = stack.float()
    p = kind(*given) if given else grid.solve(view, dims)
    values, where = grid.apply(view, p, fits=own, mask=mask)
    if not mask:
        return (values,)
    return values, torch.ones_like(values) if where is None else where


def needs_mask(scheme: Scheme, own: bool) -> bool:
    """Whether an element can be clipped: never in a range of its own, unless the scale type rounds it down."""
    grid = scheme.grid
    return not grid.straight and (grid.clips or not own)


@torch.library.custom_op("qatana::mask_gradient", mutates_args=())
def _mask_gradient(grad: Tensor, inside: Tensor) -> Tensor:
    """grad * inside, by way of bytes: torch multiplies float by bool four times slower than it copies."""
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    flat = [t.view(-1) for t in (out, grad.contiguous(), inside.contiguous().view(torch.uint8))]
    sweep(_times, flat[:1], flat[1:])
    return out


def _times(grad: Tensor, inside: Tensor) -> tuple[Tensor]:
    return (grad * inside.to(grad.dtype),)


@_mask_gradient.register_fake
def _(grad: Tensor, inside: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


@torch.library.custom_op("qatana::fake_quantize_own", mutates_args=())
def _own(x: Tensor, scheme: str, check: bool) -> tuple[Tensor, Tensor]:
    found = _scheme(scheme)
    return walk(x.contiguous(), found, None, check=check)


@_own.register_fake
def _(x: Tensor, scheme: str, check: bool) -> tuple[Tensor, Tensor]:
    mask = needs_mask(_scheme(scheme), True)
    return x.new_empty(x.shape), x.new_empty(x.shape if mask else (0,), dtype=torch.bool)


def _save_inside(ctx, inputs, output) -> None:
    ctx.masked = output[1].ndim == output[0].ndim and output[1].shape == output[0].shape
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros of the mask's size come with each gradient
    if ctx.masked:
        ctx.save_for_backward(output[1])


def _pass_inside(ctx, grad: Tensor, _: Tensor | None):
    return (torch.ops.qatana.mask_gradient(grad, ctx.saved_tensors[0]) if ctx.masked else grad), None, None


_own.register_autograd(_pass_inside, setup_context=_save_inside)


@torch.library.custom_op("qatana::fake_quantize_given", mutates_args=())
def _given(x: Tensor, scale: Tensor, offset: Tensor, scheme: str, learned: bool) -> tuple[Tensor, Tensor]:
    """`learned`: x is saved, so no mask is."""
    found = _scheme(scheme)
    return walk(x.contiguous(), found, parameters_of(found, scale, offset), mask=not learned)


@_given.register_fake
def _(x: Tensor, scale: Tensor, offset: Tensor, scheme: str, learned: bool) -> tuple[Tensor, Tensor]:
    mask = not learned and needs_mask(_scheme(scheme), False)
    return x.new_empty(x.shape), x.new_empty(x.shape if mask else (0,), dtype=torch.bool)


def parameters_of(scheme: Scheme, scale: Tensor, offset: Tensor) -> Parameters:
    """Given scale and offset, shaped for the stack, the scale as its type stores it."""
    shaped = [scheme.granularity.stack_scale(v.detach().float()) for v in (scale, offset)]
    return scheme.grid.of(scheme.scale_type.store(shaped[0]) if scheme.rounds_scale else shaped[0], shaped[1])


def _save_given(ctx, inputs, output) -> None:
    x, scale, offset, ctx.scheme, ctx.learned = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros of the mask's size come with each gradient
    ctx.save_for_backward(*((x, scale, offset) if ctx.learned else (output[1],)))


def _given_backward(ctx, grad: Tensor, _: Tensor | None):
    if ctx.learned:
        x, scale, offset = ctx.saved_tensors
        grad_x, grad_scale = torch.ops.qatana.fake_quantize_gradients(grad, x, scale, offset, ctx.scheme)
        return grad_x, grad_scale, None, None, None
    inside = ctx.saved_tensors[0]
    masked = inside.shape == grad.shape
    return (torch.ops.qatana.mask_gradient(grad, inside) if masked else grad), None, None, None, None


_given.register_autograd(_given_backward, setup_context=_save_given)


@torch.library.custom_op("qatana::fake_quantize_gradients", mutates_args=())
def _gradients(grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """Gradients of x and of a learned scale, from x itself: no float tensor is saved but x, which lives anyway."""
    found = _scheme(scheme)
    grid, granularity, dims = found.ranged, found.granularity, found.granularity.stack_dims()
    p = parameters_of(found, scale, offset)
    stack, upstream = granularity.stack(x.contiguous()), granularity.stack(grad.contiguous())
    along = dims[0] != 0
    if granularity.kind == "tensor":  # in rows whose terms are summed in float32, the sums then in float64
        stack, upstream = (v.view(-1, math.gcd(v.numel(), ROW)) for v in (stack, upstream))
    grad_x, inner = torch.empty_like(upstream), dims if along else (-1,)
    terms = torch.empty(grid.field_shape("rows", stack.shape, inner), device=x.device)
    sweep(_learned, [grad_x, terms], [stack, upstream, *p], grid, inner, compile=compiles(grid))
    grad_scale = terms if along else terms.double().sum(0 if p.scale.ndim else None).float()
    return granularity.unview(grad_x, x.shape), grad_scale.reshape(scale.shape)


ROW = 512
"""Elements of a tensor with one learned scale that are summed in float32."""


def _learned(
    stack: Tensor,
    upstream: Tensor,
    scale: Tensor,
    offset: Tensor,
    encode: Tensor,
    grid: RangeGrid,
    dims: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """grad_x = g inside, 0 outside;   terms = sum of g (level - t) inside, of g level outside."""
    p, g = Parameters(scale, offset, encode), upstream.float()
    t = grid.scaled(stack.float(), p)
    level = t.clone()
    inside = grid.round_(level, p, mask=True)
    if inside is None:
        return g, ((level - t) * g).sum(dims, keepdim=True)
    return g * inside, ((level - t * inside) * g).sum(dims, keepdim=True)


@_gradients.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=grad.dtype), scale.new_empty(scale.shape)


def fake_quantize_by(
    x: Tensor, scheme: Scheme, scale: Tensor | None = None, offset: Tensor | None = None, *, check: bool = True
) -> Tensor:
    """x as its quantized form reads back, in x's dtype and shape (any float dtype, any strides, zero elements too).

    scale    None: from x itself, by the scheme. Else static or learned (it gets LSQ's gradient), of `granularity.scale_shape`
    offset   the zero point of an asymmetric integer scheme, shaped like the scale; None: the scheme's own
    check    refuse NaN and infinity in x where the scale follows from it; else they come out again
    Raises: SchemeError if the granularity does not fit x's shape; DataError for NaN or infinity (eager mode, on the CPU)."""
    scheme.check(x.shape)
    if scale is None:
        on_host = x.device.type == "cpu"  # asking a GPU would make the host wait
        check = check and on_host and not torch.compiler.is_compiling()
        return _own(x, scheme.text, check)[0]
    if not scheme.takes_scale:
        raise SchemeError(
            f"{scheme}: its scales follow from the tensor itself and cannot be given; hold its parameters (fake_quantize_held)"
        )
    if offset is None:
        offset = torch.full_like(scale, scheme.zero_point, requires_grad=False)
    return _given(x, scale, offset, scheme.text, scale.requires_grad)[0]

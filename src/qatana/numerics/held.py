"""Held parameters: solved once, then kept, for schemes whose parameters are more than a scale (`Scheme.holds`).

    held  = hold(x0, scheme)                                        once, at calibration
    x_hat = values(codes(x; held); held)                            bit for bit, float32 inside, cast to x's dtype at the end
    d x_hat / d x = 1 where x was not clipped, 0 where it was        (straight-through; the parameters count as constant)

Two-level scales (NVFP4, bitsandbytes' double quantization), minima and super-blocks (GGUF), half-quadratic zero points (HQQ) and mean
magnitudes (BitNet, binary). A search of K-quants or of HQQ costs as much as dozens of copies of the tensor; a step by what it
found costs as much as one with a static scale. Weights that move beyond the range that was solved for clip there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qatana.errors import SchemeError
from qatana.numerics.by_scheme import _scheme, needs_mask, refuse_not_finite, refuse_overflow, solve, stack_of, walk
from qatana.numerics.scheme import Scheme


def hold(x: Tensor, scheme: Scheme) -> tuple[Tensor, ...]:
    """The parameters that x itself asks for: float32, contiguous, without a gradient; names and shapes as in `held_shapes`.

    Raises: SchemeError if the scheme does not hold or its granularity does not fit; DataError for NaN or infinity."""
    shapes = held_shapes(scheme, x.shape)
    with torch.no_grad():
        x = x.detach().contiguous()
        refuse_not_finite(x)
        p = solve(x, scheme)
        refuse_overflow(p, x)
        if not x.numel():
            return tuple(torch.zeros(shape, device=x.device) for shape in shapes.values())
        found = [getattr(p, name).float().expand(shape) for name, shape in shapes.items()]
        return tuple(t.clone(memory_format=torch.contiguous_format) for t in found)


def held_shapes(scheme: Scheme, shape: torch.Size | tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the held parameters of a tensor of `shape`, by name, in the order of `hold`. They broadcast against the scheme's stack:
    one number per block; GGUF super-blocks have numbers of their own.

    Raises: SchemeError if the scheme does not hold or its granularity does not fit."""
    if not scheme.holds:
        raise SchemeError(
            f"{scheme} holds no parameters: "
            + ("it takes a scale, give it that" if scheme.takes_scale else "make it with scale='static'")
        )
    scheme.check(shape)
    stack = stack_of(torch.empty(shape, device="meta"), scheme)
    dims = scheme.granularity.stack_dims()
    return {name: scheme.grid.field_shape(name, stack.shape, dims) for name in scheme.grid.fields}


def fake_quantize_held(x: Tensor, scheme: Scheme, held: Sequence[Tensor]) -> Tensor:
    """x as its quantized form reads back by held parameters, in x's dtype and shape (any float dtype, any strides).

    held  what `hold` gave for a tensor of this shape
    Saves one byte per element for the backward pass, nothing where nothing clips. One operator in a compiled or exported graph.
    Raises: SchemeError if the scheme does not hold, its granularity does not fit or the held shapes are others."""
    if not torch.compiler.is_compiling():  # a compiled graph has the shapes it was traced with
        _check_held(x.shape, scheme, held)
    return _held(x, [p.detach() for p in held], scheme.text)[0]


def _check_held(shape: torch.Size, scheme: Scheme, held: Sequence[Tensor]) -> None:
    expected, found = list(held_shapes(scheme, shape).values()), [tuple(p.shape) for p in held]
    if found != expected:
        raise SchemeError(
            f"{scheme} holds parameters of shapes {expected} for a tensor of shape {tuple(shape)}, not {found}; "
            f"solve them again: hold(x, scheme)"
        )


@torch.library.custom_op("qatana::fake_quantize_held", mutates_args=())
def _held(x: Tensor, held: Sequence[Tensor], scheme: str) -> tuple[Tensor, Tensor]:
    found = _scheme(scheme)
    return walk(x.contiguous(), found, found.grid.restore([p.float() for p in held]))


@_held.register_fake
def _(x: Tensor, held: Sequence[Tensor], scheme: str) -> tuple[Tensor, Tensor]:
    mask = needs_mask(_scheme(scheme), False)
    return x.new_empty(x.shape), x.new_empty(x.shape if mask else (0,), dtype=torch.bool)


def _save_inside(ctx, inputs, output) -> None:
    ctx.masked, ctx.count = output[1].shape == output[0].shape, len(inputs[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros of the mask's size come with each gradient
    if ctx.masked:
        ctx.save_for_backward(output[1])


def _pass_inside(ctx, grad: Tensor, _: Tensor | None):
    return (
        (torch.ops.qatana.mask_gradient(grad, ctx.saved_tensors[0]) if ctx.masked else grad),
        [None] * ctx.count,
        None,
    )


_held.register_autograd(_pass_inside, setup_context=_save_inside)

"""Codes of a tensor by a scheme, and the values that they stand for.

    codes, p = quantize_by(x, scheme)                    solve or take the parameters, then code every element
    x_hat    = dequantize_by(codes, p, scheme, shape)    what `fake_quantize_by(x, scheme)` gives, bit for bit (integers know no -0)

Both are operators, opaque to torch.compile and torch.export: one call in the graph, no table of a codebook and no search traced.
What crosses an operator's border are plain tensors: the parameters that the scheme does not derive from others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qatana.numerics.by_scheme import _scheme, part_of, refuse_not_finite, refuse_overflow, solve, stack_of, stack_shape
from qatana.numerics.pieces import pieces
from qatana.numerics.scales import Parameters
from qatana.numerics.scheme import Scheme


def _fields(scheme: Scheme) -> tuple[str, ...]:
    """The parameters that cross: of GGUF types, which have up to eight, those from which the others follow."""
    return scheme.grid.fields if scheme.is_gguf else Parameters._fields


def _of_fields(scheme: Scheme, found: Sequence[Tensor]) -> Any:
    """`Parameters`, or those of the GGUF type."""
    return scheme.grid.restore(found) if scheme.is_gguf else Parameters(*found)


def _shapes(scheme: Scheme, shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a tensor of `shape`: one number per block, () for one block that is the whole tensor."""
    stack, dims = stack_shape(shape, scheme), scheme.granularity.stack_dims()
    return [scheme.grid.field_shape(name, stack, dims) for name in _fields(scheme)]


@torch.library.custom_op("qatana::quantize_by", mutates_args=())
def _quantize(x: Tensor, held: Sequence[Tensor], scheme: str) -> list[Tensor]:
    """[codes, *parameters]; with held parameters the codes alone: an operator returns nothing that it was given."""
    x, found = x.contiguous(), _scheme(scheme)
    refuse_not_finite(x)
    p = found.grid.restore(held) if held else solve(x, found)
    refuse_overflow(p, x)
    stack = stack_of(x, found)
    codes = torch.empty(stack.shape, dtype=found.code_dtype, device=x.device)
    for piece in pieces(stack):
        codes[piece] = found.grid.codes(stack[piece], part_of(p, piece, stack.shape[0])).to(found.code_dtype)
    if held:
        return [codes]
    # One number for a whole tensor comes as () or (1,); that of no element as one per block of a tensor with some.
    numbers = zip((getattr(p, name).float() for name in _fields(found)), _shapes(found, x.shape), strict=True)
    shaped = (v.expand(shape) if shape else v.reshape(()) for v, shape in numbers)
    return [codes, *(v.clone(memory_format=torch.contiguous_format) for v in shaped)]


@_quantize.register_fake
def _(x: Tensor, held: Sequence[Tensor], scheme: str) -> list[Tensor]:
    found = _scheme(scheme)
    codes = x.new_empty(stack_shape(x.shape, found), dtype=found.code_dtype)
    own = [] if held else _shapes(found, x.shape)
    return [codes, *(x.new_empty(shape, dtype=torch.float32) for shape in own)]


@torch.library.custom_op("qatana::dequantize_by", mutates_args=())
def _dequantize(
    codes: Tensor, parameters: Sequence[Tensor], scheme: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    found = _scheme(scheme)
    p = _of_fields(found, parameters)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for piece in pieces(codes):
        out[piece] = found.grid.values(codes[piece], part_of(p, piece, codes.shape[0]))
    return found.granularity.unview(out, tuple(shape))


@_dequantize.register_fake
def _(codes: Tensor, parameters: Sequence[Tensor], scheme: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return codes.new_empty(list(shape), dtype=dtype)


def quantize_by(x: Tensor, scheme: Scheme, held: Sequence[Tensor] | None = None) -> tuple[Tensor, Parameters]:
    """Codes of x in the format's storage dtype, shaped like the scheme's stack, and the parameters that read them back: float32, one
    number per block, () where the block is the whole tensor. Any float dtype, any strides, zero elements too; no gradient.

    held  parameters from `hold`; None: from x itself
    Raises: SchemeError if the granularity does not fit x's shape; DataError for NaN or infinity, also in compiled code."""
    scheme.check(x.shape)
    given = None if held is None else [p.detach() for p in held]
    p = None if given is None else scheme.grid.restore(given)
    codes, *own = _quantize(x.detach(), given or [], scheme.text)
    return codes, _of_fields(scheme, own) if p is None else p


def dequantize_by(
    codes: Tensor,
    p: Parameters,
    scheme: Scheme,
    shape: torch.Size | tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """values(codes) in `shape` and `dtype`."""
    return _dequantize(codes, [getattr(p, name) for name in _fields(scheme)], scheme.text, list(shape), dtype)

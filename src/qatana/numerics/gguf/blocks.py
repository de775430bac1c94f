"""What all GGUF block types share: parameters, rounding half away from zero, bytes of float16, nibbles.

A *view* is float32 (*lead, n_blocks, block); parameters are (*lead, n_blocks, 1); codes have the view's shape and hold the
stored code of each element as a float32 number. Bytes are uint8 (*lead, n_bytes), as llama.cpp and `gguf` lay them out.
Reference: ggml-quants.c and ggml-common.h of llama.cpp; gguf/quants.py (0.19.0), with which every type here is bit-equal."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qatana.errors import SchemeError

# The largest float32 below one half: y + this truncates to roundf(y), where y + 0.5 may round up to the next integer first.
_BELOW_HALF = 0.5 - 2.0**-25


class Parameters(NamedTuple):
    """scale, offset: as stored, in float32 (offset is added; 0 where none).  encode, encode_offset: what the references
    compute codes with: for most types the reciprocal of the scale and the offset before they were rounded to float16."""

    scale: Tensor
    offset: Tensor
    encode: Tensor
    encode_offset: Tensor


def without_offset(scale: Tensor, encode: Tensor) -> Parameters:
    """Parameters of a type that stores a scale alone."""
    zero = scale.new_zeros(())
    return Parameters(scale, zero, encode, zero)


def half_with_reciprocal(d: Tensor) -> Parameters:
    """Parameters of a type that stores float16(d) alone and computes codes with 1/d, d not rounded."""
    return without_offset(stored_half(d), reciprocal(d))


class Grid(ABC):
    """A GGUF block type. `parameters` is what its own `solve` returns: Parameters, or SuperParameters of the K-quants.

    name       as in GGMLQuantizationType, in lower case
    block      elements that share a scale;  row: what the last dimension must be a multiple of (a super-block's elements)
    row_bytes  bytes that `row` elements take
    values_    values(codes), in the memory of the codes where that is possible
    fake       values(codes(view)), by the shortest way
    inside     where an element was not clipped (None: nothing clips)
    parts      the fields of a block as they follow each other: uint8 (*lead, K / row, n), together row_bytes
    read       codes and parameters of bytes (*lead, K / row, row_bytes)"""

    name: str
    block: int
    row: int
    row_bytes: int

    @abstractmethod
    def solve(self, view: Tensor) -> Any: ...

    @abstractmethod
    def codes(self, view: Tensor, parameters: Any) -> Tensor: ...

    @abstractmethod
    def values_(self, codes: Tensor, parameters: Any) -> Tensor: ...

    @abstractmethod
    def parts(self, codes: Tensor, parameters: Any) -> list[Tensor]: ...

    @abstractmethod
    def read(self, rows: Tensor) -> tuple[Tensor, Any]: ...

    def values(self, codes: Tensor, parameters: Any) -> Tensor:
        return self.values_(codes.clone(), parameters)

    def fake(self, view: Tensor, parameters: Any) -> Tensor:
        return self.values_(self.codes(view, parameters), parameters)

    def inside(self, view: Tensor, parameters: Any) -> Tensor | None:
        return None

    def to_bytes(self, codes: Tensor, parameters: Any) -> Tensor:
        return torch.cat(self.parts(codes, parameters), dim=-1).flatten(-2)

    def from_bytes(self, data: Tensor, shape: torch.Size | tuple[int, ...]) -> tuple[Tensor, Any]:
        return self.read(rows_of(self, data, shape))


class HalfFirst(Grid):
    """A type whose block is float16(d), then packed codes, and nothing else."""

    @abstractmethod
    def pack(self, codes: Tensor) -> Tensor: ...

    @abstractmethod
    def unpack(self, data: Tensor) -> Tensor: ...

    def parts(self, codes: Tensor, parameters: Parameters) -> list[Tensor]:
        return [half_to_bytes(parameters.scale), self.pack(codes)]

    def read(self, rows: Tensor) -> tuple[Tensor, Parameters]:
        scale = half_from_bytes(rows[..., :2])
        return self.unpack(rows[..., 2:]), without_offset(scale, reciprocal(scale))


def check_shape(grid: Grid, shape: torch.Size | tuple[int, ...]) -> None:
    """Raise SchemeError if rows of this shape cannot be cut into the type's blocks."""
    if not shape or shape[-1] % grid.row:
        last = shape[-1] if shape else "none"
        raise SchemeError(
            f"gguf:{grid.name} stores rows of a multiple of {grid.row} elements; the last dimension of shape "
            f"{tuple(shape)} is {last}: choose a type with a smaller block (q8_0, q4_0: 32) or leave this tensor in float"
        )


def view_of(grid: Grid, x: Tensor) -> Tensor:
    """x (*lead, K) as float32 (*lead, K / block, block). Raises: SchemeError where K is not a multiple of `grid.row`."""
    check_shape(grid, x.shape)
    return x.float().reshape(*x.shape[:-1], x.shape[-1] // grid.block, grid.block)


def rows_of(grid: Grid, data: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Bytes of a tensor of `shape` as (*lead, K / row, row_bytes).

    Raises: SchemeError where the bytes are no uint8 or their number is not the one that `shape` takes."""
    check_shape(grid, shape)
    rows = shape[-1] // grid.row
    expected = math.prod(shape[:-1]) * rows * grid.row_bytes
    if data.dtype != torch.uint8 or data.numel() != expected:
        raise SchemeError(
            f"gguf:{grid.name} of shape {tuple(shape)} takes {expected} bytes (uint8), not {data.numel()} of {data.dtype}: "
            f"the file is truncated or the tensor is of another type"
        )
    return data.reshape(*shape[:-1], rows, grid.row_bytes)


def reciprocal(d: Tensor) -> Tensor:
    """1 / d in float32, unrounded by float16; 0 where d = 0 and where 1 / d overflows (|d| < 2^-128): such a block is zero.

    (There the references convert infinity and NaN to an integer, which C leaves undefined.)"""
    return torch.where(d.abs() > 2.0**-128, d.reciprocal(), torch.zeros_like(d))


def round_away(y: Tensor, signs: Tensor) -> Tensor:
    """C's roundf for |y| < 2^22, in place: to nearest, half away from zero, never -0. signs: a tensor with y's signs."""
    return y.abs_().add_(_BELOW_HALF).floor_().copysign_(signs).add_(0.0)


def stored_half(d: Tensor) -> Tensor:
    """d as float16 holds it, in float32: to nearest even, infinite from 65520 on, as the references write it.

    By arithmetic, since torch.compile drops a cast to float16 and back: adding c = 1.5 * 2^13 * 2^e, e the exponent of d
    (at least -14, for the subnormals), leaves ten fraction bits."""
    bounded = d.clamp(-(2.0**17), 2.0**17)
    power = torch.bitwise_and(bounded.view(torch.int32), 0x7F800000).view(torch.float32).clamp(min=2.0**-14)
    c = power * (1.5 * 2.0**13)
    rounded = (bounded + c) - c
    rounded = torch.where(rounded.abs() > 65504, rounded * torch.inf, rounded)
    return torch.copysign(rounded, d)


def magnitude(view: Tensor) -> Tensor:
    """max|x| of each block, (*lead, n_blocks, 1); two reductions make no copy of the tensor, as abs() would."""
    return torch.maximum(view.amax(-1, keepdim=True), -view.amin(-1, keepdim=True)).abs()


def signed_extreme(view: Tensor) -> Tensor:
    """The signed element of largest magnitude of each block, the first of equals: (*lead, n_blocks, 1).

    argmax takes eight times as long as the two reductions, so it looks only at blocks in which +m and -m both occur."""
    if view.device.type != "cpu" or torch.compiler.is_compiling():
        return _first_extreme(view)
    high, low = view.amax(-1, keepdim=True), view.amin(-1, keepdim=True)
    extreme = torch.where(high > -low, high, low)
    tied = (high == -low).squeeze(-1)
    if bool(tied.any()):
        extreme[tied] = _first_extreme(view[tied])
    return extreme


def _first_extreme(view: Tensor) -> Tensor:
    return view.gather(-1, view.abs().argmax(-1, keepdim=True))


def ordered_sum(terms: Tensor) -> Tensor:
    """Sum over the first dimension, first term first: float32 sums in the order of the C code."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def column_parts(view: Tensor) -> Iterator[Tensor]:
    """Blocks as columns, (block, n) with n at most 8,192: what is computed of them at a time stays in the cache."""
    for part in view.reshape(-1, view.shape[-1]).split(8192):
        yield part.t().contiguous()


def half_to_bytes(scale: Tensor) -> Tensor:
    """float32 numbers (*lead, n) that float16 holds, to little-endian bytes (*lead, 2n)."""
    return scale.to(torch.float16).contiguous().view(torch.uint8)


def half_from_bytes(data: Tensor) -> Tensor:
    """Little-endian bytes (*lead, 2n) of float16 to float32 (*lead, n)."""
    return data.contiguous().view(torch.float16).float()


def shifts(data: Tensor, amounts: range) -> Tensor:
    """data (*lead, n) >> each amount: uint8 (*lead, len(amounts), n)."""
    amount = torch.tensor(list(amounts), dtype=torch.uint8, device=data.device)
    return data.unsqueeze(-2) >> amount.unsqueeze(-1)


def pack_strided(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (*lead, 8 / bits, n) to bytes (*lead, n): the codes of part i stand at bits i * bits of each byte."""
    out = codes[..., 0, :].clone()
    for part in range(1, codes.shape[-2]):
        out |= codes[..., part, :] << (part * bits)
    return out


def unpack_strided(data: Tensor, bits: int) -> Tensor:
    """Bytes (*lead, n) to uint8 codes (*lead, 8 / bits, n), as `pack_strided` laid them out."""
    return shifts(data, range(0, 8, bits)) & (2**bits - 1)


def pack_adjacent(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (*lead, n) to bytes (*lead, n * bits / 8): code j of each 8 / bits neighbours stands at bits j * bits."""
    return pack_strided(codes.unflatten(-1, (-1, 8 // bits)).transpose(-1, -2), bits)


def unpack_adjacent(data: Tensor, bits: int) -> Tensor:
    """Bytes (*lead, n) to uint8 codes (*lead, n * 8 / bits), as `pack_adjacent` laid them out."""
    return unpack_strided(data, bits).transpose(-1, -2).flatten(-2)

"""Q8_0, Q4_0, Q5_0, Q4_1, Q5_1: 32 elements, a float16 scale, a float16 minimum in the _1 types."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qatana.numerics.gguf import blocks
from qatana.numerics.gguf.blocks import Grid, HalfFirst, Parameters


@dataclass(frozen=True)
class Q8_0(HalfFirst):
    """d = max|x| / 127;  code = roundf(x * (1/d)), half away from zero;  value = code * float16(d).

    34 bytes: d, 32 signed codes. Nothing clips: |x| * (1/d) <= 127 up to rounding."""

    name = "q8_0"
    block = 32
    row = 32
    row_bytes = 34

    def solve(self, view: Tensor) -> Parameters:
        amax = blocks.magnitude(view)
        return blocks.half_with_reciprocal(amax / torch.full_like(amax, 127))

    def codes(self, view: Tensor, parameters: Parameters) -> Tensor:
        return blocks.round_away(view * parameters.encode, view)

    def values_(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return codes.mul_(parameters.scale)

    def pack(self, codes: Tensor) -> Tensor:
        return codes.to(torch.int8).view(torch.uint8)

    def unpack(self, data: Tensor) -> Tensor:
        return data.contiguous().view(torch.int8).float()


@dataclass(frozen=True)
class SignedExtreme(HalfFirst):
    """Q4_0 (bits = 4) and Q5_0 (bits = 5), with h = 2^(bits-1): the extreme element is exactly code 0.

    m = the signed element of largest |x| (first of equals);  d = m / -h, which may be negative;
    code = min(2^bits - 1, floor(x * (1/d) + h + 0.5));  value = (code - h) * float16(d).
    Elements of the sign opposite to m clip at h - 1. 18 or 22 bytes: d, (fifth bits), nibbles."""

    bits: int

    block = 32
    row = 32

    @property
    def name(self) -> str:
        return f"q{self.bits}_0"

    @property
    def row_bytes(self) -> int:
        return 2 + 4 * self.bits

    @property
    def half(self) -> int:
        return 2 ** (self.bits - 1)

    def solve(self, view: Tensor) -> Parameters:
        return blocks.half_with_reciprocal(blocks.signed_extreme(view) * (-1 / self.half))

    def codes(self, view: Tensor, parameters: Parameters) -> Tensor:
        scaled = (view * parameters.encode).add_(self.half + 0.5)
        return scaled.trunc_().clamp_(0, 2 * self.half - 1)

    def values_(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return codes.sub_(self.half).mul_(parameters.scale)

    def inside(self, view: Tensor, parameters: Parameters) -> Tensor | None:
        return (view * parameters.encode).add_(self.half + 0.5) < 2 * self.half

    def pack(self, codes: Tensor) -> Tensor:
        return _codes_to_bytes(codes, self.bits)

    def unpack(self, data: Tensor) -> Tensor:
        return _codes_from_bytes(data, self.bits)


@dataclass(frozen=True)
class Minimum(Grid):
    """Q4_1 (bits = 4) and Q5_1 (bits = 5): from the least to the greatest element.

    d = (max - min) / (2^bits - 1);  code = min(2^bits - 1, floor((x - min) * (1/d) + 0.5));
    value = code * float16(d) + float16(min). Nothing clips. 20 or 24 bytes: d, min, (fifth bits), nibbles."""

    bits: int

    block = 32
    row = 32

    @property
    def name(self) -> str:
        return f"q{self.bits}_1"

    @property
    def row_bytes(self) -> int:
        return 4 + 4 * self.bits

    def solve(self, view: Tensor) -> Parameters:
        low, high = view.amin(-1, keepdim=True), view.amax(-1, keepdim=True)
        d = (high - low) / torch.full_like(low, 2**self.bits - 1)
        return Parameters(blocks.stored_half(d), blocks.stored_half(low), blocks.reciprocal(d), low)

    def codes(self, view: Tensor, parameters: Parameters) -> Tensor:
        scaled = (view - parameters.encode_offset).mul_(parameters.encode).add_(0.5)
        return scaled.trunc_().clamp_(0, 2**self.bits - 1)

    def values_(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return codes.mul_(parameters.scale).add_(parameters.offset)

    def parts(self, codes: Tensor, parameters: Parameters) -> list[Tensor]:
        halves = torch.cat([parameters.scale, parameters.offset], dim=-1)
        return [blocks.half_to_bytes(halves), _codes_to_bytes(codes, self.bits)]

    def read(self, rows: Tensor) -> tuple[Tensor, Parameters]:
        scale, low = blocks.half_from_bytes(rows[..., :4]).split(1, dim=-1)
        return _codes_from_bytes(rows[..., 4:], self.bits), Parameters(scale, low, blocks.reciprocal(scale), low)


def _codes_to_bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes (*lead, 32) of 4 or 5 bits: byte j of the last 16 holds element j low and j + 16 high; the fifth bit of
    element j stands at bit j of the four bytes before them."""
    raw = codes.to(torch.uint8)
    low = blocks.pack_strided((raw & 15).unflatten(-1, (2, 16)), 4)
    if bits == 4:
        return low
    return torch.cat([blocks.pack_adjacent(raw >> 4, 1), low], dim=-1)


def _codes_from_bytes(data: Tensor, bits: int) -> Tensor:
    low = blocks.unpack_strided(data[..., -16:], 4).flatten(-2)
    if bits == 4:
        return low.float()
    return (low | blocks.unpack_adjacent(data[..., :4], 1) << 4).float()

"""Q8_0, Q4_0, Q5_0, Q4_1, Q5_1: 32 elements, a float16 scale, a float16 minimum in the _1 types."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qatana.numerics.gguf import blocks
from qatana.numerics.gguf.blocks import Parameters


@dataclass(frozen=True)
class Q8_0:
    """d = max|x| / 127;  code = roundf(x * (1/d)), half away from zero;  value = code * float16(d).

    34 bytes: d, 32 signed codes. Nothing clips: |x| * (1/d) <= 127 up to rounding."""

    name = "q8_0"
    block = 32
    row = 32
    row_bytes = 34

    def solve(self, view: Tensor) -> Parameters:
        amax = blocks.magnitude(view)
        d = amax / torch.full_like(amax, 127)
        return blocks.without_offset(blocks.stored_half(d), blocks.reciprocal(d))

    def codes(self, view: Tensor, parameters: Parameters) -> Tensor:
        return blocks.round_away(view * parameters.encode, view)

    def values(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return codes * parameters.scale

    def fake(self, view: Tensor, parameters: Parameters) -> Tensor:
        return self.codes(view, parameters).mul_(parameters.scale)

    def inside(self, view: Tensor, parameters: Parameters) -> Tensor | None:
        return None

    def to_bytes(self, codes: Tensor, parameters: Parameters) -> Tensor:
        parts = [blocks.half_to_bytes(parameters.scale), codes.to(torch.int8).view(torch.uint8)]
        return torch.cat(parts, dim=-1).flatten(-2)

    def from_bytes(self, data: Tensor, shape: torch.Size | tuple[int, ...]) -> tuple[Tensor, Parameters]:
        rows = blocks.rows_of(self, data, shape)
        scale = blocks.half_from_bytes(rows[..., :2])
        codes = rows[..., 2:].contiguous().view(torch.int8).float()
        return codes, blocks.without_offset(scale, blocks.reciprocal(scale))


@dataclass(frozen=True)
class SignedExtreme:
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
        d = blocks.signed_extreme(view) * (-1 / self.half)
        return blocks.without_offset(blocks.stored_half(d), blocks.reciprocal(d))

    def codes(self, view: Tensor, parameters: Parameters) -> Tensor:
        scaled = (view * parameters.encode).add_(self.half + 0.5)
        return scaled.trunc_().clamp_(0, 2 * self.half - 1)

    def values(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return (codes - self.half).mul_(parameters.scale)

    def fake(self, view: Tensor, parameters: Parameters) -> Tensor:
        return self.codes(view, parameters).sub_(self.half).mul_(parameters.scale)

    def inside(self, view: Tensor, parameters: Parameters) -> Tensor | None:
        return (view * parameters.encode).add_(self.half + 0.5) < 2 * self.half

    def to_bytes(self, codes: Tensor, parameters: Parameters) -> Tensor:
        parts = [blocks.half_to_bytes(parameters.scale), _codes_to_bytes(codes, self.bits)]
        return torch.cat(parts, dim=-1).flatten(-2)

    def from_bytes(self, data: Tensor, shape: torch.Size | tuple[int, ...]) -> tuple[Tensor, Parameters]:
        rows = blocks.rows_of(self, data, shape)
        scale = blocks.half_from_bytes(rows[..., :2])
        codes = _codes_from_bytes(rows[..., 2:], self.bits)
        return codes, blocks.without_offset(scale, blocks.reciprocal(scale))


@dataclass(frozen=True)
class Minimum:
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

    def values(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return (codes * parameters.scale).add_(parameters.offset)

    def fake(self, view: Tensor, parameters: Parameters) -> Tensor:
        return self.codes(view, parameters).mul_(parameters.scale).add_(parameters.offset)

    def inside(self, view: Tensor, parameters: Parameters) -> Tensor | None:
        return None

    def to_bytes(self, codes: Tensor, parameters: Parameters) -> Tensor:
        halves = blocks.half_to_bytes(torch.cat([parameters.scale, parameters.offset], dim=-1))
        return torch.cat([halves, _codes_to_bytes(codes, self.bits)], dim=-1).flatten(-2)

    def from_bytes(self, data: Tensor, shape: torch.Size | tuple[int, ...]) -> tuple[Tensor, Parameters]:
        rows = blocks.rows_of(self, data, shape)
        scale, low = blocks.half_from_bytes(rows[..., :4]).split(1, dim=-1)
        codes = _codes_from_bytes(rows[..., 4:], self.bits)
        return codes, Parameters(scale, low, blocks.reciprocal(scale), low)


def _codes_to_bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes (*lead, 32) of 4 or 5 bits: byte j of the last 16 holds element j low and j + 16 high; the fifth bit of
    element j stands at bit j of the four bytes before them."""
    raw = codes.to(torch.uint8)
    low = blocks.pack_strided((raw & 15).unflatten(-1, (2, 16)), 4)
    if bits == 4:
        return low
    fifth = blocks.pack_strided((raw >> 4).unflatten(-1, (4, 8)).transpose(-1, -2), 1)
    return torch.cat([fifth, low], dim=-1)


def _codes_from_bytes(data: Tensor, bits: int) -> Tensor:
    low = blocks.unpack_strided(data[..., -16:], 4).flatten(-2)
    if bits == 4:
        return low.float()
    fifth = blocks.unpack_strided(data[..., :4], 1).transpose(-1, -2).flatten(-2)
    return (low | fifth << 4).float()

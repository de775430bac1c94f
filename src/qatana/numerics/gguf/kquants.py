"""Q4_K, Q5_K (sub-blocks of 32) and Q6_K (of 16) in super-blocks of 256, whose scales are integers times one float16.

Codes and values are one equation each. The parameters of Q6_K are an argmin over 19 trial scales of a weighted least
squares in closed form; those of Q4_K and Q5_K are no equation at all, but a search whose step depends on the one before:

    for t in 21 (16) trial numbers of steps:  codes_t = clamp(rint((x - min) * t / (max - min)));
        (scale_t, min_t) = weighted least squares of x on codes_t;  if its error is the least yet: scale, min = scale_t, min_t

(the next trial counts its codes from the new min). Then scales and minima are rounded to 6 (8) bits over the super-block.
`solve` is that search, sums in the reference's order. It costs hundreds of passes over the tensor, so training solves
once (or now and then) and keeps the parameters, where every other type solves at each step.
Reference: make_qkx2_quants, make_qx_quants, quantize_row_q*_K_ref in ggml-quants.c (ggml 0.25; x86-64 without fused
multiply-add). The gguf package (0.19.0) reads these types and has no quantizer for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qatana.numerics.gguf import blocks
from qatana.numerics.gguf.blocks import Grid, column_parts, ordered_sum


class SuperParameters(NamedTuple):
    """scale = super_scale * scale_code, offset = -super_offset * offset_code: (*lead, n_sub_blocks, 1), float32; the super_
    tensors (*lead, n_super_blocks, 1) hold float16 numbers; codes of scales and offsets as float32. encode: the scale."""

    scale: Tensor
    offset: Tensor
    encode: Tensor
    encode_offset: Tensor
    super_scale: Tensor
    super_offset: Tensor
    scale_code: Tensor
    offset_code: Tensor


def _parameters(super_scale: Tensor, super_offset: Tensor, scale_code: Tensor, offset_code: Tensor) -> SuperParameters:
    scale = (super_scale * scale_code).flatten(-2).unsqueeze(-1)
    offset = -(super_offset * offset_code).flatten(-2).unsqueeze(-1)
    return SuperParameters(scale, offset, scale, offset, super_scale, super_offset, scale_code, offset_code)


def _without_offset(super_scale: Tensor, scale_code: Tensor) -> SuperParameters:
    return _parameters(super_scale, torch.zeros_like(super_scale), scale_code, torch.zeros_like(scale_code))


@dataclass(frozen=True)
class KMinimum(Grid):
    """Q4_K (bits = 4) and Q5_K (bits = 5): value = scale * code + offset;  code = clamp(rint((x - offset) / scale)), 0 where
    scale = 0;  scale = float16(d) * sc, offset = -float16(dmin) * m, sc and m of 6 bits for each 32 elements.

    144 or 176 bytes: d, dmin, 12 bytes of sc and m, (fifth bits), nibbles."""

    bits: int

    block = 32
    row = 256

    @property
    def name(self) -> str:
        return f"q{self.bits}_k"

    @property
    def row_bytes(self) -> int:
        return 16 + 32 * self.bits

    def solve(self, view: Tensor) -> SuperParameters:
        first, count = (-1.0, 20) if self.bits == 4 else (-0.5, 15)
        found = [_search_minimum(x, 2**self.bits - 1, first, 0.1, count) for x in column_parts(view)]
        scales, lows = (
            torch.cat(part).reshape(view.shape[:-1]).unflatten(-1, (-1, 8)) for part in zip(*found, strict=True)
        )
        super_scale, scale_code = _six_bits(scales)
        super_offset, offset_code = _six_bits(lows)
        return _parameters(super_scale, super_offset, scale_code, offset_code)

    def codes(self, view: Tensor, parameters: SuperParameters) -> Tensor:
        codes = (
            ((view - parameters.offset) / parameters.scale).round_().clamp_(0, 2**self.bits - 1).add_(0.0)
        )  # never -0
        return torch.where(parameters.scale > 0, codes, torch.zeros_like(codes))

    def values_(self, codes: Tensor, parameters: SuperParameters) -> Tensor:
        return codes.mul_(parameters.scale).add_(parameters.offset)

    def inside(self, view: Tensor, parameters: SuperParameters) -> Tensor | None:
        codes = ((view - parameters.offset) / parameters.scale).round_()
        return (codes >= 0) & (codes <= 2**self.bits - 1)

    def parts(self, codes: Tensor, parameters: SuperParameters) -> list[Tensor]:
        halves = blocks.half_to_bytes(torch.cat([parameters.super_scale, parameters.super_offset], dim=-1))
        raw = codes.to(torch.uint8).unflatten(-2, (-1, 8))
        parts = [halves, _six_bits_to_bytes(parameters.scale_code, parameters.offset_code)]
        if self.bits == 5:
            parts.append(blocks.pack_strided(raw >> 4, 1))
        parts.append(blocks.pack_strided((raw & 15).unflatten(-2, (4, 2)), 4).flatten(-2))
        return parts

    def read(self, rows: Tensor) -> tuple[Tensor, SuperParameters]:
        super_scale, super_offset = blocks.half_from_bytes(rows[..., :4]).split(1, dim=-1)
        scale_code, offset_code = _six_bits_from_bytes(rows[..., 4:16])
        codes = blocks.unpack_strided(rows[..., -128:].unflatten(-1, (4, 32)), 4).flatten(-3, -2)
        if self.bits == 5:
            codes = codes | blocks.unpack_strided(rows[..., 16:48], 1) << 4
        codes = codes.flatten(-3, -2).float()
        return codes, _parameters(super_scale, super_offset, scale_code, offset_code)


@dataclass(frozen=True)
class Q6_K(Grid):
    """value = scale * (code - 32);  code = clamp(rint(x / scale), -32, 31) + 32, 0 where scale = 0;  scale = float16(d) * sc,
    sc of 8 signed bits for each 16 elements; scales may be negative. 210 bytes: low nibbles, high two bits, 16 sc, d."""

    name = "q6_k"
    block = 16
    row = 256
    row_bytes = 210

    def solve(self, view: Tensor) -> SuperParameters:
        scale = torch.cat([_search_signed(x, 32) for x in column_parts(view)])
        scale = scale.reshape(view.shape[:-1]).unflatten(-1, (-1, 16))
        extreme = blocks.signed_extreme(scale)
        inverse = torch.full_like(extreme, -128) / extreme
        # GROUP_MAX_EPS of the reference: such a super-block is all zero.
        empty = extreme.abs() < 1e-15
        code = (inverse * scale).round_().clamp_(max=127).add_(0.0)  # never -0
        super_scale = blocks.stored_half(inverse.reciprocal())
        super_scale, code = (torch.where(empty, torch.zeros_like(part), part) for part in (super_scale, code))
        return _without_offset(super_scale, code)

    def codes(self, view: Tensor, parameters: SuperParameters) -> Tensor:
        codes = (view / parameters.scale).round_().clamp_(-32, 31).add_(32)
        return torch.where(parameters.scale != 0, codes, torch.zeros_like(codes))

    def values_(self, codes: Tensor, parameters: SuperParameters) -> Tensor:
        return codes.sub_(32).mul_(parameters.scale)

    def inside(self, view: Tensor, parameters: SuperParameters) -> Tensor | None:
        codes = (view / parameters.scale).round_()
        return (codes >= -32) & (codes <= 31)

    def parts(self, codes: Tensor, parameters: SuperParameters) -> list[Tensor]:
        raw = codes.to(torch.uint8).unflatten(-2, (-1, 16)).flatten(-2)
        low = blocks.pack_strided((raw & 15).unflatten(-1, (2, 2, 64)), 4).flatten(-2)
        high = blocks.pack_strided((raw >> 4).unflatten(-1, (2, 4, 32)), 2).flatten(-2)
        scales = parameters.scale_code.to(torch.int8).view(torch.uint8)
        return [low, high, scales, blocks.half_to_bytes(parameters.super_scale)]

    def read(self, rows: Tensor) -> tuple[Tensor, SuperParameters]:
        low = blocks.unpack_strided(rows[..., :128].unflatten(-1, (2, 64)), 4).flatten(-3)
        high = blocks.unpack_strided(rows[..., 128:192].unflatten(-1, (2, 32)), 2).flatten(-3)
        code = rows[..., 192:208].contiguous().view(torch.int8).float()
        super_scale = blocks.half_from_bytes(rows[..., 208:])
        codes = (low | high << 4).float().unflatten(-1, (16, 16)).flatten(-3, -2)
        return codes, _without_offset(super_scale, code)


def _six_bits(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers >= 0 (*lead, super, 8) to float16(max / 63) and codes rint(63 / max * number)."""
    largest = numbers.amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.zeros_like(largest))
    inverse = torch.full_like(largest, 63) / largest
    # Below 2^-100 the inverse may overflow, and d is 0 in float16 long before.
    inverse = torch.where(largest > 2.0**-100, inverse, torch.zeros_like(inverse))
    codes = (inverse * numbers).round_().clamp_(0, 63).add_(0.0)  # never -0
    return blocks.stored_half(largest / torch.full_like(largest, 63)), codes


def _six_bits_to_bytes(scale_code: Tensor, offset_code: Tensor) -> Tensor:
    """8 + 8 codes of 6 bits in 12 bytes: the first four whole, the last four as nibbles, their high bits above the first."""
    scale, offset = scale_code.to(torch.uint8), offset_code.to(torch.uint8)
    parts = [codes[..., :4] | (codes[..., 4:] >> 4) << 6 for codes in (scale, offset)]
    return torch.cat([*parts, (scale[..., 4:] & 15) | (offset[..., 4:] & 15) << 4], dim=-1)


def _six_bits_from_bytes(data: Tensor) -> tuple[Tensor, Tensor]:
    scale, offset, low = data.split(4, dim=-1)
    scales = torch.cat([scale & 63, (low & 15) | (scale >> 2) & 48], dim=-1)
    offsets = torch.cat([offset & 63, (low >> 4) | (offset >> 2) & 48], dim=-1)
    return scales.float(), offsets.float()


def _search_minimum(x: Tensor, top: int, first: float, step: float, count: int) -> tuple[Tensor, Tensor]:
    """make_qkx2_quants with weights rms + |x|: scale and -min >= 0 of x (32, *blocks), each (*blocks)."""
    # torch's float32 sqrt is not correctly rounded on CPU (MKL); in float64 the last place no longer matters.
    rms = (ordered_sum(x * x) / x.new_full((), 32)).double().sqrt().float()
    weight = rms + x.abs()
    sum_w, sum_x = ordered_sum(weight), ordered_sum(weight * x)
    low, high = x.amin(0).clamp(max=0), x.amax(0)
    inverse = x.new_full((), top) / (high - low)
    scale, offset = inverse.reciprocal(), low
    codes = (inverse * (x - low)).round_().clamp_(0, top)
    best = ordered_sum(weight * (scale * codes + offset - x).square_())
    for trial in range(count + 1):
        numerator = (x.new_full((), first) + x.new_full((), step) * trial) + top
        codes = (numerator / (high - offset) * (x - offset)).round_().clamp_(0, top)
        sums = ordered_sum(torch.stack([weight * codes, weight * codes * codes, weight * codes * x], dim=1))
        sum_l, sum_l2, sum_xl = sums.unbind(0)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        this_offset = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = this_offset > 0
        this_scale = torch.where(positive, sum_xl / sum_l2, this_scale)
        this_offset = torch.where(positive, torch.zeros_like(this_offset), this_offset)
        error = ordered_sum(weight * (this_scale * codes + this_offset - x).square_())
        better = (determinant > 0) & (error < best)
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, this_scale, scale), torch.where(better, this_offset, offset)
    constant = high == low
    scale = torch.where(constant, torch.zeros_like(scale), scale)
    return scale, -torch.where(constant, low, offset)


def _search_signed(x: Tensor, half: int) -> Tensor:
    """make_qx_quants with weights x^2: the scale of x (16, *blocks), (*blocks)."""
    extreme = blocks.signed_extreme(x.movedim(0, -1)).squeeze(-1)
    weight = x * x
    scale, best = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for trial in (0, *range(-9, 0), *range(1, 10)):
        numerator = -(x.new_full((), 0.1) * trial + half)
        codes = (numerator / extreme * x).round_().clamp_(-half, half - 1)
        sum_xl, sum_l2 = ordered_sum(torch.stack([weight * x * codes, weight * codes * codes], dim=1)).unbind(0)
        better = (sum_l2 > 0) & ((sum_xl * sum_xl > best * sum_l2) | (trial == 0))
        this_scale = sum_xl / sum_l2
        scale = torch.where(better, this_scale, scale)
        best = torch.where(better, this_scale * sum_xl, best)
    return torch.where(extreme.abs() < 1e-15, torch.zeros_like(scale), scale)

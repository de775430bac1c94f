"""MXFP4 (32 elements, E8M0 scale) and NVFP4 (16 elements, UE4M3 scale) as ggml rounds and stores them.

Both hold E2M1 in a table of doubled values, 0 1 2 3 4 6 8 12 and their negatives, so the scale here is half of the
format's own. Code of an element: the table entry nearest to x, the one of smaller magnitude where two are equally near
(the references take the first minimum of |scale * entry - x|; the OCP specification rounds such ties to even)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qatana.numerics.gguf import blocks
from qatana.numerics.gguf.blocks import Grid, Parameters

_TABLE = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


class _E2M1(Grid):
    """Codes and values under any scale; the scale is also what codes are computed with."""

    def codes(self, view: Tensor, parameters: Parameters) -> Tensor:
        return _codes(_levels(view, parameters.scale))

    def values_(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return _table(codes.device)[codes.long()].mul_(parameters.scale)

    def fake(self, view: Tensor, parameters: Parameters) -> Tensor:
        return _levels(view, parameters.scale).mul_(parameters.scale)

    def inside(self, view: Tensor, parameters: Parameters) -> Tensor | None:
        return view.abs() <= parameters.scale * 12


@dataclass(frozen=True)
class MXFP4(_E2M1):
    """e = floor(float32(log2 max|x|)) - 2 + 127 (0 for a zero block);  scale = 2^(e - 128).

    float32(log2) reaches the next integer a little before max|x| reaches the next power of two (from 1 to 45 of its
    last places): e is then one more than the specification's. Below 2^-125, e wraps to 255 and further down, as in the
    references (the block is then zero: the scale stored exceeds 2^100). Elements beyond 12 * scale clip.
    17 bytes: e, then element j low and j + 16 high."""

    name = "mxfp4"
    block = 32
    row = 32
    row_bytes = 17

    def solve(self, view: Tensor) -> Parameters:
        amax = blocks.magnitude(view)
        # Through float64, so that every device rounds the logarithm the same, correct way.
        exponent = amax.double().log2().float().floor() + 125
        stored = torch.where(amax > 0, exponent, torch.zeros_like(amax)).to(torch.int32) & 255
        scale = _half_of_e8m0(stored)
        return blocks.without_offset(scale, scale)

    def parts(self, codes: Tensor, parameters: Parameters) -> list[Tensor]:
        bits = parameters.scale.contiguous().view(torch.int32)
        exponent = torch.where(bits < 1 << 23, bits >> 22, (bits >> 23) + 1).to(torch.uint8)
        return [exponent, blocks.pack_strided(codes.to(torch.uint8).unflatten(-1, (2, 16)), 4)]

    def read(self, rows: Tensor) -> tuple[Tensor, Parameters]:
        scale = _half_of_e8m0(rows[..., :1].to(torch.int32))
        codes = blocks.unpack_strided(rows[..., 1:], 4).flatten(-2).float()
        return codes, blocks.without_offset(scale, scale)


@dataclass(frozen=True)
class NVFP4(_E2M1):
    """Per 16 elements, scale = ue4m3(max|x| / 6) / 2; no tensor-wide scale.

    ue4m3 rounds half up, takes everything that rounds to 256 or more as 448, and reads 0x7F as 0, as the references do.

    36 bytes for 64 elements: four scales, then for each 16 eight bytes, element j low and j + 8 high.
    (The gguf package (0.19.0) reads this type and rounds its scale, but has no quantizer: the C code has.)"""

    name = "nvfp4"
    block = 16
    row = 64
    row_bytes = 36

    def solve(self, view: Tensor) -> Parameters:
        amax = blocks.magnitude(view)
        stored = _ue4m3(amax / torch.full_like(amax, 6))
        scale = _half_of_ue4m3(torch.where(stored < 0x78, stored, torch.full_like(stored, 0x7E)))
        return blocks.without_offset(scale, scale)

    def parts(self, codes: Tensor, parameters: Parameters) -> list[Tensor]:
        scales = _ue4m3(parameters.scale * 2).to(torch.uint8).unflatten(-2, (-1, 4)).flatten(-2)
        halves = codes.to(torch.uint8).unflatten(-2, (-1, 4)).unflatten(-1, (2, 8))
        return [scales, blocks.pack_strided(halves, 4).flatten(-2)]

    def read(self, rows: Tensor) -> tuple[Tensor, Parameters]:
        scale = _half_of_ue4m3(rows[..., :4].int()).flatten(-2).unsqueeze(-1)
        codes = blocks.unpack_strided(rows[..., 4:].unflatten(-1, (4, 8)), 4).flatten(-2).flatten(-3, -2)
        return codes.float(), blocks.without_offset(scale, scale)


def _levels(view: Tensor, scale: Tensor) -> Tensor:
    """The table's entry nearest to x / scale, the smaller magnitude of two; +0 for all that rounds to zero, 0 where scale = 0.

    Entries from 2 on are 2^k and 1.5 * 2^k, steps of 2^(k-1); below they are integers. The quotient decides as x itself would:
    a midpoint times a scale has few bits, so the next float beside it gives a quotient beside the midpoint."""
    level = view / torch.where(scale > 0, scale, torch.full_like(scale, torch.inf))
    step = torch.bitwise_and(level.view(torch.int32), 0x7F800000).view(torch.float32)
    step.clamp_(2.0, 8.0).mul_(0.5)
    level.abs_().div_(step).sub_(0.5).ceil_().mul_(step).clamp_(0.0, 12.0)
    return level.copysign_(view).add_(0.0)  # never -0


def _codes(levels: Tensor) -> Tensor:
    """Codes 0..15 of the table's entries, as float32."""
    magnitude = torch.bucketize(levels.abs().contiguous(), torch.tensor(_TABLE, device=levels.device))
    return (magnitude + 8 * (levels < 0)).float()


def _table(device: torch.device) -> Tensor:
    return torch.tensor([*_TABLE, 0.0, *(-value for value in _TABLE[1:])], device=device)


def _half_of_e8m0(stored: Tensor) -> Tensor:
    """2^(e - 128) of int32 exponents 0..255: the two smallest are subnormal."""
    bits = torch.where(stored < 2, 0x00200000 << stored.clamp(max=1), (stored - 1) << 23)
    return bits.view(torch.float32)


def _ue4m3(x: Tensor) -> Tensor:
    """Unsigned E4M3 of float32 0 <= x < 2^120 as int32, half up: the bit below the mantissa alone decides. From 0x7F on
    the number is none of the format's."""
    bits = x.contiguous().view(torch.int32)
    exponent = (bits >> 23) - 120
    subnormal = (x * 512 + 0.5).clamp(max=7).to(torch.int32)
    # A carry of the mantissa goes into the exponent: adding is enough.
    normal = ((exponent << 3) | ((bits >> 20) & 7)) + ((bits >> 19) & 1)
    return torch.where(exponent <= 0, subnormal, normal)


def _half_of_ue4m3(stored: Tensor) -> Tensor:
    exponent, mantissa = (stored >> 3) & 15, (stored & 7).float()
    power = ((exponent + 120) << 23).view(torch.float32)
    value = torch.where(exponent == 0, mantissa * 2.0**-9, (mantissa * 0.125 + 1) * power) * 0.5
    return torch.where(stored == 0x7F, torch.zeros_like(value), value)

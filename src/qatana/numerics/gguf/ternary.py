"""TQ1_0 and TQ2_0 (256 elements), Q2_0 (64) and Q1_0 (128): ternary, two-bit and sign weights with one float16 scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qatana.numerics.gguf import blocks
from qatana.numerics.gguf.blocks import Grid, HalfFirst, Parameters


@dataclass(frozen=True)
class Ternary(Grid):
    """TQ1_0 (packed = "trits") and TQ2_0 (packed = "bits"): one grid, two byte layouts.

    d = max|x| of 256;  code = roundf(x * (1/d)) + 1 in {0, 1, 2}, half away from zero;  value = (code - 1) * float16(d).
    Lossless only for weights that already are {-s, 0, s}: d is the maximum, not the mean, and is taken anew.
    The scale stands last. TQ2_0, 66 bytes: byte m of each 32 holds elements m, m+32, m+64, m+96 at bits 0, 2, 4, 6.
    TQ1_0, 54 bytes: five trits a byte, the first most significant, stored as ceil(q * 256 / 243)."""

    packed: str

    block = 256
    row = 256

    @property
    def name(self) -> str:
        return "tq1_0" if self.packed == "trits" else "tq2_0"

    @property
    def row_bytes(self) -> int:
        return 54 if self.packed == "trits" else 66

    def solve(self, view: Tensor) -> Parameters:
        return blocks.half_with_reciprocal(blocks.magnitude(view))

    def codes(self, view: Tensor, parameters: Parameters) -> Tensor:
        return blocks.round_away(view * parameters.encode, view).add_(1)

    def values_(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return codes.sub_(1).mul_(parameters.scale)

    def parts(self, codes: Tensor, parameters: Parameters) -> list[Tensor]:
        raw = codes.to(torch.uint8)
        packed = _trits_to_bytes(raw) if self.packed == "trits" else _fourths_to_bytes(raw)
        return [packed, blocks.half_to_bytes(parameters.scale)]

    def read(self, rows: Tensor) -> tuple[Tensor, Parameters]:
        packed, scale = rows[..., :-2], blocks.half_from_bytes(rows[..., -2:])
        codes = _trits_from_bytes(packed) if self.packed == "trits" else _fourths_from_bytes(packed)
        return codes.float(), blocks.without_offset(scale, blocks.reciprocal(scale))


@dataclass(frozen=True)
class Q2_0(HalfFirst):
    """d = max|x| of 64;  code = clamp(roundf(x * (1/d)) + 1, 0, 3);  value = (code - 1) * float16(d): {-d, 0, d, 2d}.

    18 bytes: d, then four codes a byte, element 4k + j at bits 2j. The rule itself never gives code 3.
    The gguf package (0.19.0) does not know this type; the reference is ggml-quants.c of llama.cpp (ggml 0.25)."""

    name = "q2_0"
    block = 64
    row = 64
    row_bytes = 18

    def solve(self, view: Tensor) -> Parameters:
        return blocks.half_with_reciprocal(blocks.magnitude(view))

    def codes(self, view: Tensor, parameters: Parameters) -> Tensor:
        return blocks.round_away(view * parameters.encode, view).add_(1).clamp_(0, 3)

    def values_(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return codes.sub_(1).mul_(parameters.scale)

    def pack(self, codes: Tensor) -> Tensor:
        return blocks.pack_adjacent(codes.to(torch.uint8), 2)

    def unpack(self, data: Tensor) -> Tensor:
        return blocks.unpack_adjacent(data, 2).float()


@dataclass(frozen=True)
class Q1_0(HalfFirst):
    """d = mean|x| of 128;  code = 1 where x >= 0, else 0;  value = code ? float16(d) : -float16(d).

    The sum is taken in float32, first element first, as the C code does. 18 bytes: d, then element j at bit j % 8 of byte
    j / 8. The gguf package (0.19.0) knows the size of this type only; the reference is ggml-quants.c (ggml 0.25)."""

    name = "q1_0"
    block = 128
    row = 128
    row_bytes = 18

    def solve(self, view: Tensor) -> Parameters:
        sums = [blocks.ordered_sum(part.abs()) for part in blocks.column_parts(view)]
        d = torch.cat(sums).reshape(*view.shape[:-1], 1) * (1 / 128)
        return blocks.without_offset(blocks.stored_half(d), torch.ones_like(d))

    def codes(self, view: Tensor, parameters: Parameters) -> Tensor:
        return (view >= 0).float()

    def values_(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return torch.where(codes > 0, parameters.scale, -parameters.scale)

    def pack(self, codes: Tensor) -> Tensor:
        return blocks.pack_adjacent(codes.to(torch.uint8), 1)

    def unpack(self, data: Tensor) -> Tensor:
        return blocks.unpack_adjacent(data, 1).float()

    def read(self, rows: Tensor) -> tuple[Tensor, Parameters]:
        codes, parameters = super().read(rows)
        return codes, parameters._replace(encode=torch.ones_like(parameters.scale))  # codes are signs: no factor


def _fourths_to_bytes(raw: Tensor) -> Tensor:
    return blocks.pack_strided(raw.unflatten(-1, (2, 4, 32)), 2).flatten(-2)


def _fourths_from_bytes(data: Tensor) -> Tensor:
    return blocks.unpack_strided(data.unflatten(-1, (2, 32)), 2).flatten(-3)


def _trits_to_bytes(raw: Tensor) -> Tensor:
    """Groups of 5 x 32, 5 x 16 and 4 x 4 elements: 32 + 16 + 4 bytes; the last four bytes hold four trits each."""
    parts = []
    for group in (raw[..., :160].unflatten(-1, (5, 32)), raw[..., 160:240].unflatten(-1, (5, 16)), _padded(raw)):
        number = torch.zeros_like(group[..., 0, :], dtype=torch.int32)
        for trit in range(5):
            number = number * 3 + group[..., trit, :]
        parts.append(((number * 256 + 242) // 243).to(torch.uint8))
    return torch.cat(parts, dim=-1)


def _padded(raw: Tensor) -> Tensor:
    """The last 16 elements as (5, 4): four trits and a zero as the fifth."""
    group = raw[..., 240:].unflatten(-1, (4, 4))
    return torch.cat([group, torch.zeros_like(group[..., :1, :])], dim=-2)


def _trits_from_bytes(data: Tensor) -> Tensor:
    parts = []
    for first, last, trits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        powers = torch.tensor([1, 3, 9, 27, 81][:trits], dtype=torch.int32, device=data.device)
        shifted = (data[..., first:last].int().unsqueeze(-2) * powers.unsqueeze(-1)) & 255
        parts.append((shifted * 3 >> 8).to(torch.uint8).flatten(-2))
    return torch.cat(parts, dim=-1)

"""Where a tensor was inside its range, one bit per element.

    bit i of byte j = inside[8 j + i], in memory order; bits behind the last element are 1
A byte of eight ones says that nothing there was clipped, which is most bytes: `apply` looks at those before at anything else."""

from __future__ import annotations

import torch
from torch import Tensor

from qatana.numerics.pieces import pieces

GATHER = 0x0102040810204080
"""Times eight bytes of 0 or 1, as one little-endian number: byte i moves to bit i of the highest byte."""
SPREAD, ONE_EACH = 0x0101010101010101, 0x8040201008040201 - 2**64
"""A byte in all eight places; bit i of byte i."""


def length(elements: int) -> int:
    """Bytes of a mask."""
    return -(-elements // 8)


def everywhere(elements: int, device: torch.device) -> Tensor:
    """The mask of a tensor that was inside its range as a whole."""
    return torch.full((length(elements),), 255, dtype=torch.uint8, device=device)


def pack_mask(inside: Tensor) -> Tensor:
    """bool or uint8 of 0 and 1, any shape -> uint8 (ceil(n / 8),)."""
    flat = inside.reshape(-1).view(torch.uint8)
    short = -flat.numel() % 8
    if short:
        flat = torch.cat([flat, flat.new_ones(short)])
    return ((flat.contiguous().view(torch.int64) * GATHER) >> 56).to(torch.uint8)


def unpack_mask(mask: Tensor, elements: int) -> Tensor:
    """uint8 (ceil(n / 8),) -> uint8 (n,) of 0 and 1."""
    spread = (mask.to(torch.int64) * SPREAD) & ONE_EACH
    return spread.view(torch.uint8).ne(0).view(torch.uint8)[:elements]


def nothing_clipped(mask: Tensor) -> bool:
    """Whether every element was inside."""
    return not mask.numel() or int(mask.amin()) == 255


def apply_mask(flat: Tensor, mask: Tensor) -> Tensor:
    """flat (n,) times its mask: gradients outside the range are 0. A new tensor."""
    out = torch.empty_like(flat)
    for piece in pieces(flat):  # pieces begin at multiples of 8 elements
        bits, part = mask[piece.start // 8 : length(piece.stop)], flat[piece]
        if int(bits.amin()) == 255:
            out[piece] = part
        else:
            torch.mul(part, unpack_mask(bits, part.numel()).to(flat.dtype), out=out[piece])
    return out

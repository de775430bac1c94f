"""Where a tensor was inside its range, one bit per element.

    bit i of byte 64 b + j = inside[512 b + 64 i + j], in memory order; bits behind the last element are 1
so that eight bytes side by side come from eight numbers side by side, which processors like."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qatana.numerics.fused import sweep

BITS, BYTES = 8, 64
BLOCK = BITS * BYTES


def length(elements: int) -> int:
    """Bytes of a mask."""
    return -(-elements // BLOCK) * BYTES


def everywhere(elements: int, device: torch.device) -> Tensor:
    """The mask of a tensor that was inside its range as a whole."""
    return torch.full((length(elements),), 255, dtype=torch.uint8, device=device)


def bits_of(inside: Tensor) -> Tensor:
    """bool or uint8 of 0 and 1 (R, 8, 64) -> uint8 (R, 64)."""
    return (inside.to(torch.int32) << _shifts(inside.device)).sum(1).to(torch.uint8)


def ones_of(bits: Tensor) -> Tensor:
    """uint8 (R, 1, 64) -> int32 (R, 8, 64) of 0 and 1."""
    return (bits.to(torch.int32) >> _shifts(bits.device)) & 1


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(BITS, dtype=torch.int32, device=device)[None, :, None]


def blocks(flat: Tensor) -> tuple[Tensor, Tensor | None]:
    """flat (n,) as (R, 8, 64), a view, and what is left over, with zeros behind it, as (1, 8, 64)."""
    whole = flat.numel() // BLOCK * BLOCK
    rest = flat[whole:]
    tail = F.pad(rest, (0, BLOCK - rest.numel())).view(1, BITS, BYTES) if rest.numel() else None
    return flat[:whole].view(-1, BITS, BYTES), tail


def sweep_blocks(
    function: Callable[..., tuple[Tensor, ...]], out: Tensor, mask: Tensor | None, flat: Sequence[Tensor], ins: Sequence[Tensor],
    *constants: Hashable, compile: bool = True,
) -> None:  # fmt: skip
    """out (n,), mask (`length`,) = function(*flat, *ins, *constants) on blocks (R, 8, 64) of the tensors `flat` (n,): a mask takes bits
    (R, 64), as `bits_of` gives them."""
    mains, tails = zip(*(blocks(t) for t in flat), strict=True)
    rows, whole = mains[0].shape[0], mains[0].numel()
    outs = [out[:whole].view(mains[0].shape), *([] if mask is None else [mask.view(-1, BYTES)[:rows]])]
    sweep(function, outs, [*mains, *ins], *constants, compile=compile)
    if tails[0] is not None:
        found, *bits = function(*tails, *ins, *constants)
        out[whole:] = found.view(-1)[: out.numel() - whole]
        if mask is not None:
            mask[-BYTES:] = bits[0].view(-1)


def _pack(inside: Tensor) -> tuple[Tensor]:
    return (bits_of(inside),)


def pack_mask(inside: Tensor) -> Tensor:
    """bool or uint8 of 0 and 1, any shape -> uint8 (`length`,)."""
    flat = inside.reshape(-1).view(torch.uint8)
    out = everywhere(flat.numel(), flat.device).view(-1, BYTES)
    main, tail = blocks(flat)
    sweep(_pack, [out[: main.shape[0]]], [main])
    if tail is not None:
        tail.view(-1)[flat.numel() % BLOCK :] = 1
        out[-1:] = bits_of(tail)
    return out.view(-1)


def unpack_mask(mask: Tensor, elements: int) -> Tensor:
    """uint8 (`length`,) -> uint8 (n,) of 0 and 1."""
    bits = mask.view(-1, 1, BYTES)
    out = torch.empty((bits.shape[0], BITS, BYTES), dtype=torch.uint8, device=mask.device)
    sweep(_unpack, [out], [bits])
    return out.view(-1)[:elements]


def _unpack(bits: Tensor) -> tuple[Tensor]:
    return (ones_of(bits),)


def nothing_clipped(mask: Tensor) -> bool:
    """Whether every element is known to be inside: a GPU is not asked, which would make the host wait."""
    return not mask.numel() or (mask.device.type == "cpu" and int(mask.amin()) == 255)


def _apply(x: Tensor, bits: Tensor) -> tuple[Tensor]:
    return (x * ones_of(bits),)


def apply_mask(flat: Tensor, mask: Tensor) -> Tensor:
    """flat (n,) times its mask: gradients outside the range are 0. A new tensor."""
    out = torch.empty_like(flat)
    main, tail = blocks(flat)
    bits, whole = mask.view(-1, 1, BYTES), main.numel()
    sweep(_apply, [out[:whole].view(main.shape)], [main, bits[: main.shape[0]]])
    if tail is not None:
        out[whole:] = _apply(tail, bits[-1:])[0].view(-1)[: flat.numel() - whole]
    return out

"""Granularity: which elements of a tensor share one scale. Each value knows the *block view* of a tensor.

A block view reshapes x so that its scale broadcasts against it; the equations then need to know nothing of axes:
    tensor   x (*shape)             scale ()
    channel  x (C, ...)             scale (C, 1, ..., 1)      along `axis`
    token    x (*batch, K)          scale (*batch, 1)
    group    x (*lead, K/g, g)      scale (*lead, K/g, 1)
    block    x (R/r, r, C/c, c)     scale (R/r, 1, C/c, 1)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from qatana.errors import SchemeError


@dataclass(frozen=True)
class Granularity:
    """One of tensor, channel(axis), token, group(size), block(rows, columns); written "tensor", "channel", "channel1",
    "token", "group32", "block16x32"."""

    kind: str = "tensor"
    axis: int = 0
    size: int = 0
    rows: int = 0

    @classmethod
    def parse(cls, text: str) -> Granularity:
        match = re.fullmatch(r"(tensor|token)|channel(\d*)|group(\d+)|block(\d+)x(\d+)", text)
        if match is None:
            raise SchemeError(
                f"unknown granularity '{text}'; write 'tensor', 'channel', 'token', 'group32' or 'block16x32'"
            )
        if match[1]:
            return cls(match[1])
        if match[3]:
            return cls("group", size=_positive(int(match[3]), text))
        if match[4]:
            return cls("block", rows=_positive(int(match[4]), text), size=_positive(int(match[5]), text))
        return cls("channel", axis=int(match[2] or 0))

    def __str__(self) -> str:
        suffix = {
            "channel": str(self.axis or ""),
            "group": str(self.size),
            "block": f"{self.rows}x{self.size}",
        }
        return self.kind + suffix.get(self.kind, "")

    def check(self, shape: torch.Size | tuple[int, ...], name: str = "tensor") -> None:
        """Raise SchemeError if a tensor of this shape cannot be cut into such blocks."""
        if self.kind == "group" and (not shape or shape[-1] % self.size):
            last = shape[-1] if shape else "none"
            raise SchemeError(
                f"{name}: group size {self.size} does not divide the last dimension {last} of shape {tuple(shape)}; "
                f"choose a divisor of it or skip this layer"
            )
        if self.kind == "block" and (len(shape) != 2 or shape[0] % self.rows or shape[1] % self.size):
            raise SchemeError(
                f"{name}: blocks of {self.rows}x{self.size} do not tile shape {tuple(shape)}; it must be 2-D and divisible"
            )
        if self.kind == "channel" and self.axis >= len(shape):
            raise SchemeError(f"{name}: shape {tuple(shape)} has no axis {self.axis} for per-channel scales")

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """The block view of x (no copy where x is contiguous)."""
        if self.kind == "group":
            return x.reshape(*x.shape[:-1], x.shape[-1] // self.size, self.size)
        if self.kind == "block":
            return x.reshape(x.shape[0] // self.rows, self.rows, x.shape[1] // self.size, self.size)
        return x

    def reduced_dims(self, ndim: int) -> tuple[int, ...]:
        """The dimensions of the block view (with `ndim` dimensions) over which one scale extends."""
        if self.kind == "tensor":
            return tuple(range(ndim))
        if self.kind == "channel":
            return tuple(d for d in range(ndim) if d != self.axis)
        return (1, 3) if self.kind == "block" else (ndim - 1,)

    def scale_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of `shape` (broadcasts against its block view; () per tensor)."""
        if self.kind == "tensor":
            return ()
        if self.kind == "channel":
            return tuple(n if d == self.axis else 1 for d, n in enumerate(shape))
        if self.kind == "group":
            return (*shape[:-1], shape[-1] // self.size, 1)
        if self.kind == "block":
            return (shape[0] // self.rows, 1, shape[1] // self.size, 1)
        return (*shape[:-1], 1)


def _positive(value: int, text: str) -> int:
    if value < 1:
        raise SchemeError(f"a block has at least one element: '{text}'")
    return value

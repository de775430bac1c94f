"""Granularity: which elements of a tensor share one scale. Each value knows the *block view* of a tensor.

A block view reshapes x so that its scale broadcasts against it; the equations then need to know nothing of axes:
    tensor   x (*shape)             scale ()
    channel  x (C, ...)             scale (C, 1, ..., 1)      along `axis`
    token    x (*batch, K)          scale (*batch, 1)
    group    x (*lead, K/g, g)      scale (*lead, K/g, 1)
    block    x (R/r, r, C/c, c)     scale (R/r, 1, C/c, 1)
    flat     x (ceil(n/g), g)       scale (ceil(n/g), 1)      the tensor in memory order, zeros behind a short last block

The *stack* is the same cut with as few dimensions as there need be, the blocks first: kernels walk it in pieces."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qatana.errors import SchemeError


@dataclass(frozen=True)
class Granularity:
    """One of tensor, channel(axis), token, group(size), block(rows, columns), flat(size); written "tensor", "channel",
    "channel1", "token", "group32", "block16x32", "flat64"."""

    kind: str = "tensor"
    axis: int = 0
    size: int = 0
    rows: int = 0

    @classmethod
    def parse(cls, text: str) -> Granularity:
        match = re.fullmatch(r"(tensor|token)|channel(\d*)|group(\d+)|block(\d+)x(\d+)|flat(\d+)", text)
        if match is None:
            raise SchemeError(
                f"unknown granularity '{text}'; write 'tensor', 'channel', 'token', 'group32', 'block16x32' or 'flat64'"
            )
        if match[1]:
            return cls(match[1])
        if match[3]:
            return cls("group", size=_positive(int(match[3]), text))
        if match[4]:
            return cls("block", rows=_positive(int(match[4]), text), size=_positive(int(match[5]), text))
        if match[6]:
            return cls("flat", size=_positive(int(match[6]), text))
        return cls("channel", axis=int(match[2] or 0))

    def __str__(self) -> str:
        suffix = {
            "channel": str(self.axis or ""),
            "group": str(self.size),
            "block": f"{self.rows}x{self.size}",
            "flat": str(self.size),
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
        if self.kind == "flat":
            x = x.reshape(-1)
            short = -len(x) % self.size
            return (torch.nn.functional.pad(x, (0, short)) if short else x).view(-1, self.size)
        return x

    def unview(self, view: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        """Back from a block view or a stack to the tensor's shape."""
        return view.reshape(-1)[: math.prod(shape)].reshape(shape) if self.kind == "flat" else view.reshape(shape)

    def stack(self, x: torch.Tensor) -> torch.Tensor:
        """x as tensor (n,), channel (C, n) or (before, C, after), token (rows, K), group or flat (blocks, g), block as its view."""
        return self.view(x) if self.kind == "flat" else x.reshape(self.stack_shape(x.shape))

    def stack_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the stack of a tensor of `shape`."""
        n, size = math.prod(shape), self.size
        if self.kind == "tensor":
            return (n,)
        if self.kind == "channel":
            before, after = math.prod(shape[: self.axis]), math.prod(shape[self.axis + 1 :])
            return (before, shape[self.axis], after) if self.axis else (shape[0], after)
        if self.kind == "token":
            return math.prod(shape[:-1]), shape[-1]
        if self.kind == "block":
            return shape[0] // self.rows, self.rows, shape[1] // size, size
        return (-(-n // size) if self.kind == "flat" else n // size), size

    def stack_dims(self) -> tuple[int, ...]:
        """The dimensions of the stack over which one scale extends."""
        if self.kind == "channel" and self.axis:
            return (0, 2)
        return {"tensor": (0,), "block": (1, 3)}.get(self.kind, (-1,))

    def stack_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """A scale (of `scale_shape`) as it broadcasts against the stack."""
        if self.kind == "tensor" or self.kind == "block":
            return scale
        return scale.reshape(1, -1, 1) if self.kind == "channel" and self.axis else scale.reshape(-1, 1)

    def reduced_dims(self, ndim: int) -> tuple[int, ...]:
        """The dimensions of the block view (with `ndim` dimensions) over which one scale extends."""
        if self.kind == "tensor":
            return tuple(range(ndim))
        if self.kind == "channel":
            return tuple(d for d in range(ndim) if d != self.axis)
        return (1, 3) if self.kind == "block" else (ndim - 1,)  # token, group, flat

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
        if self.kind == "flat":
            return (-(-math.prod(shape) // self.size), 1)
        return (*shape[:-1], 1)


def _positive(value: int, text: str) -> int:
    if value < 1:
        raise SchemeError(f"a block has at least one element: '{text}'")
    return value

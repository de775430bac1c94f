"""Codebooks: the values of a format are a table. A code is an index into it; the table may lie in any order.

Nearest value by the midpoints b_i of the sorted values: position = #{i: t > b_i}, so a tie goes to the lower value (the rule
of bitsandbytes' kernels). Two entries may be the same number (both zeros of a 4-bit float): the positions keep them apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qatana.errors import SchemeError


@dataclass(frozen=True)
class Codebook:
    """A table of values, in code order.

    name    how it is written
    table   the values (float32 numbers) of codes 0, 1, ...
    order   codes in the order of their values; worked out where empty (equal values: lower code first)
    lookup  0: exact nearest value.  n > 0: t in [-1, 1] is first rounded to one of n steps, trunc((t + 1) * 0.5 * (n - 1) + 0.5),
            and the step's nearest value taken: what bitsandbytes' 8-bit CPU kernel does (n = 65536).
    ties_up a t on a midpoint goes to the higher value: #{i: t >= b_i}"""

    name: str
    table: tuple[float, ...] = field(repr=False)
    order: tuple[int, ...] = field(default=(), repr=False)
    lookup: int = 0
    ties_up: bool = False

    def __post_init__(self) -> None:
        if not 2 <= len(self.table) <= 256:
            raise SchemeError(f"codebook '{self.name}': a table has 2 to 256 values, not {len(self.table)}")
        if not all(np.isfinite(self.table)):
            raise SchemeError(f"codebook '{self.name}': every value must be finite")
        if not self.order:
            ranks = sorted(range(len(self.table)), key=lambda code: self.table[code])
            object.__setattr__(self, "order", tuple(ranks))
        if sorted(self.order) != list(range(len(self.table))):
            raise SchemeError(f"codebook '{self.name}': `order` must name every code once")

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        return (len(self.table) - 1).bit_length()

    @property
    def stored_bits(self) -> int:
        return next(width for width in (1, 2, 4, 8) if self.bits <= width)

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def largest(self) -> float:
        """The magnitude that max|x| maps to."""
        return max(abs(value) for value in self.table)

    def inside(self, t: Tensor) -> Tensor:
        """Where t lies within the table's ends."""
        values = _search(self).values
        return (t >= float(values[0])) & (t <= float(values[-1]))

    def positions(self, t: Tensor) -> Tensor:
        """Position of the nearest value among the sorted ones, int64. The fast path compares once: t goes into a bucket by its sign,
        exponent and first mantissa bits, so many that each bucket holds at most one midpoint."""
        search = _search(self).to(t.device)
        if self.lookup:
            step = t.add(1.0).mul_(0.5).mul_(self.lookup - 1.0).add_(0.5)
            step = step.nan_to_num_(0.0).clamp_(0, self.lookup - 1)  # 0 * (1 / 0), a block of zeros, gets code 0 there
            return search.base.take(step.to(torch.int64))
        if search.limit is None:
            return torch.bucketize(t, search.midpoints, right=self.ties_up)
        above = t.reshape(-1).add(0.0)  # -0 becomes 0, in whose bucket a midpoint may lie
        bucket = (above.view(torch.int32) >> search.shift).to(torch.int64).add_(len(search.limit) // 2)
        limit = torch.index_select(search.limit, 0, bucket)
        above = (
            above.ge_(limit) if self.ties_up else above.gt_(limit)
        )  # in place it stays float: to bool is five times slower
        return torch.index_select(search.base, 0, bucket).add_(above).to(torch.int64).reshape(t.shape)

    def round_(self, t: Tensor) -> Tensor:
        """Nearest value, in place (float32)."""
        values = _search(self).to(t.device).values
        return t.copy_(torch.index_select(values, 0, self.positions(t).reshape(-1)).reshape(t.shape))

    def encode(self, t: Tensor) -> Tensor:
        """Codes (uint8) of the values nearest to t."""
        order = torch.tensor(self.order, dtype=torch.uint8, device=t.device)
        return order[self.positions(t)]

    def decode(self, codes: Tensor) -> Tensor:
        return torch.tensor(self.table, device=codes.device)[codes.long()]


class _Search(NamedTuple):
    """values (n,) sorted, midpoints (n - 1,), and per bucket the midpoint in it (limit; NaN: none) and the number of midpoints before
    (base). The bucket of t is its bits >> shift, counted from the negative ones."""

    values: Tensor
    midpoints: Tensor
    base: Tensor
    limit: Tensor | None = None
    shift: int = 0

    def to(self, device: torch.device) -> _Search:
        if device == self.values.device:
            return self
        limit = None if self.limit is None else self.limit.to(device)
        return _Search(self.values.to(device), self.midpoints.to(device), self.base.to(device), limit, self.shift)


@lru_cache
def _search(codebook: Codebook) -> _Search:
    table = torch.tensor(codebook.table)
    values = table[torch.tensor(codebook.order)]
    midpoints = (values[:-1] + values[1:]) / 2 + 0.0  # never -0
    if codebook.lookup:
        steps = torch.arange(codebook.lookup, dtype=torch.float32) / (codebook.lookup - 1) * 2 - 1
        return _Search(values, midpoints, torch.bucketize(steps, midpoints))
    for shift in range(27, 15, -1):
        where = midpoints.view(torch.int32) >> shift
        if len(where.unique()) == len(where):
            half = 1 << (31 - shift)
            limit = torch.full((2 * half,), torch.nan)
            limit[where.long() + half] = midpoints
            base = torch.searchsorted(_rank(where, half), _rank(torch.arange(-half, half, dtype=torch.int32), half))
            return _Search(values, midpoints, base.float(), limit, shift)
    return _Search(values, midpoints, torch.empty(0))


def _rank(bucket: Tensor, half: int) -> Tensor:
    """Buckets in the order of their numbers: among negative ones, greater bits are smaller numbers."""
    return torch.where(bucket < 0, -1 - half - bucket, bucket)

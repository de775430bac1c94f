"""Unsigned integers that count up from the smallest value of a block, which need not be 0 nor a multiple of the scale.

    scale = (high - low) / hi;   code = clamp(round((x - low) / scale), 0, hi);   x_hat = code * scale + low
Reference: optimum-quanto 0.2.7, qint2 and qint4 (`MaxOptimizer`, `quantize_affine`); its shift is -low."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qatana.numerics.formats import IntFormat
from qatana.numerics.grid import RangeGrid
from qatana.numerics.scales import SMALLEST_SCALE, Parameters

UINT4 = IntFormat(4, signed=False)


@dataclass(frozen=True)
class MinimumGrid(RangeGrid):
    """Parameters: scale, and as offset the smallest value. A block of equal numbers has the smallest scale and is exact."""

    format: IntFormat = UINT4

    def parameters(self, *statistics: Tensor) -> Parameters:
        low, high = statistics
        scale = (high - low) / torch.full_like(low, self.format.hi)
        scale = scale.clamp(min=SMALLEST_SCALE)
        return Parameters(scale, low, scale)

    def scaled(self, view: Tensor, p: Parameters) -> Tensor:
        return (view - p.offset).div_(p.encode)

    def round_(self, t: Tensor, p: Parameters, *, fits: bool = False, mask: bool = False) -> Tensor | None:
        t.round_()
        rounded = t.clone() if mask else t
        t.clamp_(0, self.format.hi)
        return rounded.eq_(t) if mask else None

    def apply(
        self, view: Tensor, p: Parameters, *, fits: bool = False, mask: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        t = self.scaled(view, p)
        inside = self.round_(t, p, fits=fits, mask=mask)
        return t.mul_(p.scale).add_(p.offset), inside

    def encode(self, t: Tensor, p: Parameters) -> Tensor:
        return t.round_().clamp_(0, self.format.hi).to(self.format.dtype)

    def decode(self, codes: Tensor, p: Parameters) -> Tensor:
        return codes.float()

    def values(self, codes: Tensor, p: Parameters) -> Tensor:
        return (codes.float() * p.scale).add_(p.offset)

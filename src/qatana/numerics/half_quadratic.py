"""HQQ: unsigned integers with a float zero point found by half-quadratic splitting. No data but the weight.

Minimizes |x - x_hat|^p over the zero point, p = 0.7, alternating
    code = clamp(round(x * s + z), 0, hi),  r = (code - z) / s
    e = shrink(x - r),  shrink(v) = sign(v) * max(0, |v| - |v|^(p-1) / beta),  beta = 10
    z = mean(code - (x - e) * s)
up to 20 times, until mean |x - r| over the whole tensor stops falling. s is the inverse step, hi / (max - min), and stays.
Reference: Badri and Shaji 2023; hqq 0.2.8 (`optimize_weights_proximal_legacy`; its paper's growing beta is not in that code)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qatana.numerics.formats import IntFormat
from qatana.numerics.grid import Dims, LevelGrid
from qatana.numerics.pieces import pieces
from qatana.numerics.scales import Parameters

ITERATIONS = 20
POWER = 0.7
BETA = 10.0
UINT4 = IntFormat(4, signed=False)


@dataclass(frozen=True)
class HqqGrid(LevelGrid):
    """code = clamp(round(x * s + z), 0, hi);  x_hat = (code - z) * (1 / s).   Parameters: scale 1/s, offset z, encode s."""

    format: IntFormat = UINT4
    round_zero: bool = False

    @property
    def local(self) -> bool:
        return False

    @property
    def whole(self) -> bool:
        return True

    @property
    def clips(self) -> bool:
        return True

    @property
    def inverse(self) -> bool:
        return True

    def solve(self, view: Tensor, dims: Dims = (-1,)) -> Parameters:
        hi = self.format.hi
        low, high = view.amin(dims, keepdim=True).float(), view.amax(dims, keepdim=True).float()
        width = high - low
        s = width.reciprocal() * hi  # two roundings, as the reference's number / tensor
        s = torch.where(width.abs() <= 1e-4, torch.ones_like(s), s).clamp(max=2e4)
        first = -low * s
        z = self._zero(view, s, first.round() if self.round_zero else first, dims)
        return Parameters(s.reciprocal(), z, s)

    def _zero(self, x: Tensor, s: Tensor, z: Tensor, dims: Dims) -> Tensor:
        """The zero point. In pieces that stay in the cache; the errors are kept whole, since the reference takes one mean of them."""
        best = torch.tensor(torch.inf, device=x.device)
        errors = torch.empty(x.shape, device=x.device)
        cuts = [slice(None)] if dims[0] == 0 else list(pieces(x))
        for _ in range(ITERATIONS):
            z = torch.cat([self._step(x[cut].float(), s[cut], z[cut], errors[cut], dims) for cut in cuts])
            error = errors.mean()
            if not bool(error < best):
                break
            best = error
        return z

    def _step(self, x: Tensor, s: Tensor, z: Tensor, errors: Tensor, dims: Dims) -> Tensor:
        """The next zero point of a piece; its |x - r| go to `errors`."""
        code = (x * s).add_(z).round_().clamp_(0, self.format.hi)
        v = x - (code - z).div_(s)
        torch.abs(v, out=errors)
        return torch.mean(code.sub_(torch.sub(x, shrink(v)).mul_(s)), dim=dims, keepdim=True)

    def scaled(self, view: Tensor, p: Parameters) -> Tensor:
        return (view * p.encode).add_(p.offset)

    def round_(self, t: Tensor, p: Parameters, *, fits: bool = False, mask: bool = False) -> Tensor | None:
        t.round_()
        rounded = t.clone() if mask else t
        t.clamp_(0, self.format.hi)
        inside = rounded.eq_(t) if mask else None
        t.sub_(p.offset)
        return inside

    def encode(self, t: Tensor, p: Parameters) -> Tensor:
        return t.round_().clamp_(0, self.format.hi).to(self.format.dtype)

    def decode(self, codes: Tensor, p: Parameters) -> Tensor:
        return codes.float() - p.offset


def shrink(v: Tensor) -> Tensor:
    """The proximal step of |v|^p: sign(v) * max(0, |v| - |v|^(p-1) / beta)."""
    size = v.abs()
    size.sub_(size.pow(POWER - 1).mul_(1.0 / BETA)).clamp_min_(0.0)
    return size.mul_(torch.sign(v))

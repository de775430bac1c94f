"""Rounding a weight so that the layer's output changes least: GPTQ.

    least  |(W - W_hat) X|^2 = tr((W - W_hat) H (W - W_hat)^T),  H = X X^T,   scales given

Columns are rounded one after the other, those that matter most first; the error of each is made up for by the columns that are not rounded
yet:   e = (w_j - w_hat_j) / U_jj,   w_k -= e U_jk for k > j,   U = the upper Cholesky factor of H^-1.

The first columns were rounded before the last, so they are looked at again: each takes the code that is best while all others stay, some
sweeps over all columns:   w_hat_j <- round(w_hat_j + R_j / H_jj),   R = (W - W_hat) H. No step makes the sum larger.

What is rounded there, w_hat_j + R_j / H_jj, is the best number for that weight while all others stay. A training starts from it
(`unrounded`): the nearer it lies to the edge of its code's cell, the less it costs to take the next code.

References: Frantar et al. 2022, GPTQ, algorithm 1, arXiv:2210.17323 (order of columns: its code's `act_order`); Behdin et al. 2023,
QuantEase, algorithm 1, arXiv:2309.01885 (sweeps)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qatana.errors import DataError
from qatana.numerics.affine import levels
from qatana.numerics.scheme import Scheme

COLUMNS = 128
"""Rounded before the rest of the matrix gets their error in one product."""
ELEMENTS = 2**22
"""Of a weight worked on at a time: its outputs know nothing of each other."""
EDGE = 0.49
"""Of a code: how far from its code a weight may stand, half a code being the edge of its cell."""


@torch.no_grad()
def compensated(
    w: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor, h: Tensor, damping: float, sweeps: int = 0
) -> Tensor:
    """W_hat, float32, on the grid of the scheme: what rounding it gives again.

    w (N, K); scale and zero_point of `granularity.scale_shape(w.shape)`; h (K, K).

    damping  share of the mean of H's diagonal that is added to it, so that it has an inverse; it is raised where it still has none
    sweeps   how often all columns are looked at again
    Raises: DataError if H holds NaN or infinite values."""
    if not bool(h.isfinite().all()):
        raise DataError(
            "gptq: a layer's inputs hold NaN or infinite values, or their squares overflow; check data and weights"
        )
    s, z = _whole(w, scheme, scale, zero_point)
    order = h.diagonal().argsort(descending=True, stable=True)
    h, u = _factor(h[order][:, order], damping)
    out = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    for some in _rows(w):
        columns, scales, zeros = (p[some][:, order].t().contiguous() for p in (w.float(), s, z))
        rounded = _columns(columns.clone(), scales, zeros, u, scheme)
        _descend(rounded, columns, scales, zeros, h, scheme, sweeps)
        out[some, order] = rounded.t()
    return out


@torch.no_grad()
def unrounded(
    w: Tensor, w_hat: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor, h: Tensor, damping: float
) -> Tensor:
    """w_hat + R / H_jj, float32, at most EDGE of a code away from w_hat: rounding gives w_hat again. Operands as in `compensated`."""
    s, z = _whole(w, scheme, scale, zero_point)
    h = _damped(h, damping)
    out = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    for some in _rows(w):
        best = w_hat[some].float()
        step, most = ((w[some].float() - best) @ h) / h.diagonal(), EDGE * s[some].abs()
        found = best + step.clamp(-most, most)
        same = levels(found, s[some], z[some], scheme.integer.lo, scheme.integer.hi) * s[some] == best
        out[some] = found.where(same, best)
    return out


def _whole(w: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each weight, float32 (N, K)."""
    view, unview = scheme.granularity.view(w), scheme.granularity.unview
    s, z = (unview(p.float().broadcast_to(view.shape), w.shape) for p in (scale, zero_point))
    return s, z


def _rows(w: Tensor) -> Iterator[slice]:
    size = max(1, ELEMENTS // max(1, w.shape[1]))
    return (slice(start, start + size) for start in range(0, len(w), size))


def _columns(w: Tensor, s: Tensor, z: Tensor, u: Tensor, scheme: Scheme) -> Tensor:
    """Some outputs, columns of the weight as rows, which are read one by one.   w, s, z (K, N), u (K, K); w is used up"""
    out = torch.empty_like(w)
    for start in range(0, len(w), COLUMNS):
        block = slice(start, min(start + COLUMNS, len(w)))
        out[block], errors = _rounded(w[block], s[block], z[block], u[block, block], scheme)
        w[block.stop :] -= u[block, block.stop :].t() @ errors
    return out


def _rounded(w: Tensor, s: Tensor, z: Tensor, u: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Columns of a block on the grid, and their errors e, both (columns, N)."""
    w, out, errors = w.clone(), torch.empty_like(w), torch.empty_like(w)
    lo, hi = scheme.integer.lo, scheme.integer.hi
    for j in range(len(w)):
        out[j] = levels(w[j], s[j], z[j], lo, hi) * s[j]
        errors[j] = (w[j] - out[j]) / u[j, j]
        w[j + 1 :] -= u[j, j + 1 :, None] * errors[j]
    return out, errors


def _descend(out: Tensor, w: Tensor, s: Tensor, z: Tensor, h: Tensor, scheme: Scheme, sweeps: int) -> None:
    """Columns on the grid, as rows (K, N), each the best that the others leave, in place.   w, s, z (K, N), h (K, K)"""
    lo, hi = scheme.integer.lo, scheme.integer.hi
    left = h @ (w - out) if sweeps else w
    for start in (start for _ in range(sweeps) for start in range(0, len(w), COLUMNS)):
        block = slice(start, min(start + COLUMNS, len(w)))
        near, own, before = left[block].clone(), h[block, block], out[block].clone()
        for j, row in enumerate(range(block.start, block.stop)):
            best = levels(out[row] + near[j] / own[j, j], s[row], z[row], lo, hi) * s[row]
            near.addr_(own[:, j], best - out[row], alpha=-1)
            out[row] = best
        left -= h[:, block] @ (out[block] - before)


def _damped(h: Tensor, damping: float) -> Tensor:
    """H, damped. Inputs that are always 0 (or none) count as independent of the others."""
    h, mean = h.float().clone(), float(h.diagonal().mean()) or 1.0
    h.diagonal()[h.diagonal() == 0] = mean
    h.diagonal().add_(damping * mean)
    return h


def _factor(h: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """H as it is damped, and U (K, K), upper: U^T U = H^-1."""
    added = damping
    while True:
        damped = _damped(h, added)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return damped, upper
        added *= 10

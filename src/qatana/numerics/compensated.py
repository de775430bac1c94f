"""Rounding a weight so that the layer's output changes least: GPTQ.

    least  |(W - W_hat) X|^2 = tr((W - W_hat) H (W - W_hat)^T),  H = X X^T,   scales given

Columns are rounded one after the other, those that matter most first; the error of each is made up for by the columns that are not rounded
yet:   e = (w_j - w_hat_j) / U_jj,   w_k -= e U_jk for k > j,   U = the upper Cholesky factor of H^-1.

The first columns were rounded before the last, so they are looked at again: each takes the code that is best while all others stay, some
sweeps over all columns:   w_hat_j <- round(w_hat_j + R_j / H_jj),   R = (W - W_hat) H. No step makes the sum larger.

References: Frantar et al. 2022, GPTQ, algorithm 1, arXiv:2210.17323 (order of columns: its code's `act_order`); Behdin et al. 2023,
QuantEase, algorithm 1, arXiv:2309.01885 (sweeps)."""

from __future__ import annotations

import torch
from torch import Tensor

from qatana.errors import DataError
from qatana.numerics.affine import levels
from qatana.numerics.scheme import Scheme

COLUMNS = 128
"""Rounded before the rest of the matrix gets their error in one product."""
ELEMENTS = 2**22
"""Of a weight worked on at a time: its outputs know nothing of each other."""


@torch.no_grad()
def compensated(
    w: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor, h: Tensor, damping: float, sweeps: int = 0
) -> Tensor:
    """W_hat, float32, on the grid of the scheme: what rounding it gives again. A training can start there, half a code away from every
    change of a code.   w (N, K); scale and zero_point of `granularity.scale_shape(w.shape)`; h (K, K).

    damping  share of the mean of H's diagonal that is added to it, so that it has an inverse; it is raised where it still has none
    sweeps   how often all columns are looked at again
    Raises: DataError if H holds NaN or infinite values."""
    if not bool(h.isfinite().all()):
        raise DataError(
            "gptq: a layer's inputs hold NaN or infinite values, or their squares overflow; check data and weights"
        )
    view = scheme.granularity.view(w)
    s, z = (scheme.granularity.unview(p.broadcast_to(view.shape), w.shape) for p in (scale.float(), zero_point.float()))
    order = h.diagonal().argsort(descending=True, stable=True)
    h, u = _factor(h[order][:, order], damping)
    out = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    size = max(1, ELEMENTS // max(1, w.shape[1]))
    for some in (slice(start, start + size) for start in range(0, len(w), size)):
        columns, scales, zeros = (p[some][:, order].t().contiguous() for p in (w.float(), s, z))
        rounded = _columns(columns.clone(), scales, zeros, u, scheme)
        _descend(rounded, columns, scales, zeros, h, scheme, sweeps)
        out[some, order] = rounded.t()
    return out


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


def _factor(h: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """H as it is damped, and U (K, K), upper: U^T U = H^-1. Inputs that are always 0 (or none) count as independent of the others."""
    h, mean = h.float().clone(), float(h.diagonal().mean())
    h.diagonal()[h.diagonal() == 0] = mean or 1.0
    added = damping * (mean or 1.0)
    while True:
        h.diagonal().add_(added)
        lower, failed = torch.linalg.cholesky_ex(h)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return h, upper
        added *= 10
